#include "hopper.h"

#include <cstring>
#include <deque>
#include <memory>
#include <vector>

namespace riformer::emulator {
namespace {

// What the eight bytes of a barrier hold on the emulator.
struct Barrier {
  int16_t expected;         // arrivals that complete a phase
  int16_t pending;          // arrivals that the current phase still waits for
  int32_t bytes_and_phase;  // twice the bytes that the copy engine still has to write, plus the parity of the phase

  int parity() const { return bytes_and_phase & 1; }
  int32_t bytes() const { return bytes_and_phase >> 1; }
};
static_assert(sizeof(Barrier) == 8, "a barrier is eight bytes");

uint64_t* barrier_of(uint64_t* barrier, int rank) {
  return reinterpret_cast<uint64_t*>(shared_memory_of(rank) + shared_address(barrier));
}

void update(uint64_t* at, int arrivals, int32_t bytes) {
  Barrier barrier;
  std::memcpy(&barrier, at, sizeof barrier);
  if (barrier.expected <= 0) fail("an arrival at a barrier that was not initialised");
  barrier.pending = static_cast<int16_t>(barrier.pending - arrivals);
  if (barrier.pending < 0) fail("more arrivals at a barrier than it expects");
  int32_t to_come = barrier.bytes() + bytes;
  int parity = barrier.parity();
  if (barrier.pending == 0 && to_come == 0) {
    barrier.pending = barrier.expected;
    parity ^= 1;
  }
  barrier.bytes_and_phase = to_come * 2 + parity;
  std::memcpy(at, &barrier, sizeof barrier);
  happened();
}

struct Product {
  float* d[kWarpgroup];
  const uint32_t* a[kWarpgroup];
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool from_registers, add;
  DType dtype;
};

struct Products : State {
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;  // not run yet, oldest first
  bool fenced = false;
  const char* unfinished() const override {
    return open.empty() && committed.empty() ? nullptr : "a product that nobody waited for";
  }
};

// The swizzle of the copy engine and of wgmma for rows of 128 or 64 bytes. It acts on the address in shared memory.
int64_t swizzled(int64_t address, int64_t row_bytes) {
  return address ^ (address >> 3 & (row_bytes == 128 ? 0x70 : 0x30));
}

// Element (row, k) of the matrix that a descriptor describes, as the hardware finds it.
float element(uint64_t descriptor, int row, int k, DType dtype) {
  const int64_t start = static_cast<int64_t>(descriptor & 0x3fff) << 4;
  const int64_t group = static_cast<int64_t>(descriptor >> 32 & 0x3fff) << 4;
  const int mode = static_cast<int>(descriptor >> 62);
  if (mode != 1 && mode != 2) fail("a descriptor without one of the swizzles in use");
  const int64_t row_bytes = mode == 1 ? 128 : 64;
  const int64_t at = swizzled(start + row / 8 * group + row % 8 * row_bytes + 2 * k, row_bytes);
  if (at < 0 || at + 2 > shared_bytes()) fail("a descriptor points outside shared memory");
  uint16_t bits;
  std::memcpy(&bits, async_view_of(cluster_rank()) + at, 2);
  return operand_value(bits, dtype);
}

void perform(const Product& product) {
  float a[64][16];
  std::vector<float> b(static_cast<size_t>(product.n) * 16);
  for (int row = 0; row < product.n; ++row)
    for (int k = 0; k < 16; ++k)
      b[static_cast<size_t>(row * 16 + k)] = element(product.b_descriptor, row, k, product.dtype);
  if (product.from_registers) {
    for (int thread = 0; thread < kWarpgroup; ++thread)
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i % 2), k = 2 * (thread % 4) + half + 8 * (i / 2);
          const uint32_t word = product.a[thread][i];
          a[row][k] = operand_value(static_cast<uint16_t>(half ? word >> 16 : word & 0xffff), product.dtype);
        }
  } else {
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < 16; ++k) a[row][k] = element(product.a_descriptor, row, k, product.dtype);
  }
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int i = 0; i < product.n / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i % 4 / 2),
                column = i / 4 * 8 + 2 * (thread % 4) + i % 2;
      const float* other = &b[static_cast<size_t>(column) * 16];
      float sum = 0.f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * other[k];
      float& d = product.d[thread][i];
      d = product.add ? d + sum : sum;
    }
}

Products& products() {
  std::shared_ptr<State>& state = warpgroup_state();
  if (!state) state = std::make_shared<Products>();
  return static_cast<Products&>(*state);
}

void perform_oldest(Products& all) {
  for (const Product& product : all.committed.front()) perform(product);
  all.committed.pop_front();
}

}  // namespace

void barrier_init(uint64_t* barrier, int arrivals) {
  if (shared_address(barrier) % 8) fail("a misaligned barrier");
  const Barrier fresh{static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0};
  std::memcpy(barrier, &fresh, sizeof fresh);
}

void barrier_arrive_at(uint64_t* barrier, int rank) { update(barrier_of(barrier, rank), 1, 0); }
void barrier_arrive_expect(uint64_t* barrier, int bytes) { update(barrier, 1, bytes); }

void barrier_wait(uint64_t* barrier, int parity) {
  wait_until(
      [=] {
        Barrier now;
        std::memcpy(&now, barrier, sizeof now);
        return now.parity() != parity;
      },
      "barrier_wait");
}

void copy_box(void* shared, const TensorMap& map, uint64_t* barrier, int column, int row, unsigned ranks) {
  const int64_t start = shared_address(shared), row_bytes = map.box_row_bytes(), bytes = row_bytes * map.box_rows;
  if (row_bytes != 128 && row_bytes != 64) fail("a box whose rows are as wide as none of the swizzles in use");
  if (start % (8 * row_bytes)) fail("a box that does not start where its swizzle does");
  if (start + bytes > shared_bytes()) fail("a box outside shared memory");
  if (ranks >> cluster_size()) fail("a copy to a thread block that the cluster does not have");
  if (row < 0 || column < 0) fail("a box that starts before the matrix");
  for (int rank = 0; rank < cluster_size(); ++rank) {
    if (!(ranks >> rank & 1)) continue;
    uint64_t* reported = barrier_of(barrier, rank);
    unsigned char* views[2] = {shared_memory_of(rank), async_view_of(rank)};
    const TensorMap from = map;
    later([=] {
      const int size = from.element_bytes;
      for (int r = 0; r < from.box_rows; ++r)
        for (int c = 0; c < from.box_columns; ++c) {
          const int64_t at = swizzled(start + r * row_bytes + c * size, row_bytes);
          const bool inside = row + r < from.rows && column + c < from.columns;
          const int64_t index = (row + r) * from.columns + column + c;
          for (unsigned char* view : views) {
            if (inside)
              std::memcpy(view + at, static_cast<const unsigned char*>(from.base) + index * size,
                          static_cast<size_t>(size));
            else
              std::memset(view + at, 0, static_cast<size_t>(size));
          }
        }
      update(reported, 0, static_cast<int32_t>(-bytes));
    });
  }
}

void product_fence() {
  meet(kWarpgroup, "product_fence", nullptr, [](void**) { products().fenced = true; });
}

void product(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool add, DType dtype) {
  struct Mine {
    float* d;
    const uint32_t* a;
    uint64_t a_descriptor, b_descriptor;
    bool add;
  } mine{d, a, a_descriptor, b_descriptor, add};
  meet(kWarpgroup, a ? "product from registers" : "product from shared memory", &mine, [&](void** all) {
    if (!products().fenced) fail("a product without product_fence before it");
    Product made{};
    made.a_descriptor = a_descriptor;
    made.b_descriptor = b_descriptor;
    made.n = n;
    made.from_registers = a != nullptr;
    made.add = add;
    made.dtype = dtype;
    for (int thread = 0; thread < kWarpgroup; ++thread) {
      const Mine& its = *static_cast<Mine*>(all[thread]);
      if (its.a_descriptor != a_descriptor || its.b_descriptor != b_descriptor || its.add != add)
        fail("the threads of a warpgroup disagree about a product");
      made.d[thread] = its.d;
      made.a[thread] = its.a;
    }
    products().open.push_back(made);
  });
}

void product_commit() {
  meet(kWarpgroup, "product_commit", nullptr, [](void**) {
    Products& all = products();
    all.committed.push_back(std::move(all.open));
    all.open.clear();
    all.fenced = false;
    while (!all.committed.empty() && coin()) perform_oldest(all);
  });
}

void product_wait(int pending) {
  meet(kWarpgroup, "product_wait", nullptr, [=](void**) {
    Products& all = products();
    while (static_cast<int>(all.committed.size()) > pending) perform_oldest(all);
  });
}

}  // namespace riformer::emulator
