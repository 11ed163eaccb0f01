// Shuffles, and the instructions of sm_80: asynchronous copies, matrices out of shared memory, a warp's product.
#include <cstring>
#include <vector>

#include "emulator.h"

namespace riformer::emulator {
namespace {

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

struct Copies : State {
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
  const char* unfinished() const override { return open.empty() ? nullptr : "a copy that was never committed"; }
};

Copies& copies() {
  std::shared_ptr<State>& state = thread_state();
  if (!state) state = std::make_shared<Copies>();
  return static_cast<Copies&>(*state);
}

void inside(const void* pointer, int64_t bytes, const char* what) {
  const int64_t offset = static_cast<const unsigned char*>(pointer) - shared_memory();
  if (offset < 0 || offset + bytes > shared_bytes()) fail(std::string(what) + " outside shared memory");
  if (offset % bytes) fail(std::string(what) + " of a misaligned address in shared memory");
}

void perform(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.shared, copy.global, 16);
  else
    std::memset(copy.shared, 0, 16);
}

float half_of(uint32_t word, int half, DType dtype) {
  return operand_value(static_cast<uint16_t>(half ? word >> 16 : word & 0xffff), dtype);
}

}  // namespace

float shuffle_xor(float value, int mask) {
  float mine[2] = {value, 0.f};
  const int lanes = warp_lanes();
  if (mask < 0 || mask >= lanes) fail("shuffle_xor reaches beyond the warp");
  meet(kWarp, "shuffle_xor", mine, [&](void** all) {
    for (int lane = 0; lane < lanes; ++lane)
      static_cast<float*>(all[lane])[1] = static_cast<float*>(all[lane ^ mask])[0];
  });
  return mine[1];
}

void copy_async_16(void* shared, const void* global, bool valid) {
  inside(shared, 16, "copy_async_16");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) fail("copy_async_16 of a misaligned address");
  const Copy copy{shared, global, valid};
  copies().open.push_back(copy);
  if (coin()) perform(copy);  // at the earliest moment; the wait performs it again, at the latest moment
}
void copy_async_commit() {
  Copies& mine = copies();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
void copy_async_wait(int pending) {
  auto& groups = copies().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

void load_matrix_x4(uint32_t (&out)[4], const void* row) {
  inside(row, 16, "load_matrix_x4");
  struct Lane {
    const void* row;
    uint32_t* out;
  } mine{row, out};
  meet(kWarp, "load_matrix_x4", &mine, [&](void** all) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t values[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(values[r], static_cast<Lane*>(all[8 * matrix + r])->row, 16);
      for (int lane = 0; lane < kWarp; ++lane) {
        const int r = lane / 4, c = 2 * (lane % 4);
        static_cast<Lane*>(all[lane])->out[matrix] = values[r][c] | static_cast<uint32_t>(values[r][c + 1]) << 16;
      }
    }
  });
}

void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], DType dtype) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  meet(kWarp, "multiply_16x8x16", &mine, [&](void** all) {
    float left[16][16], right[8][16];
    for (int lane = 0; lane < kWarp; ++lane) {
      const Lane& from = *static_cast<Lane*>(all[lane]);
      for (int half = 0; half < 2; ++half) {
        const int k = 2 * (lane % 4) + half;
        for (int i = 0; i < 4; ++i) left[lane / 4 + 8 * (i % 2)][k + 8 * (i / 2)] = half_of(from.a[i], half, dtype);
        for (int i = 0; i < 2; ++i) right[lane / 4][k + 8 * i] = half_of(from.b[i], half, dtype);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      float* to = static_cast<Lane*>(all[lane])->d;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = 0.f;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[column][k];
        to[i] += sum;
      }
    }
  });
}

}  // namespace riformer::emulator
