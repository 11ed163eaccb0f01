// Compares what the kernels and the emulator take for granted about matrix instructions with CuTe, NVIDIA's own account
// of them: which thread holds which element, how rows are swizzled in shared memory, and how a descriptor is made up.
// Prints a line per disagreement and returns how many there are.
#include <cuda_runtime.h>

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <cstdio>
#include <vector>

#include "../../../csrc/cuda/hopper.h"

namespace rf = riformer::cuda;
using riformer::bf16;
namespace gmma = cute::SM90::GMMA;

static int disagreements = 0;
static void expect(bool same, const char* what, int i, int j) {
  if (same) return;
  if (disagreements++ < 20) std::printf("%s differs at %d, %d\n", what, i, j);
}

// Small whole numbers: every sum is exact, so that nothing is compared within a tolerance.
static float left(int row, int k) { return static_cast<float>((row * 7 + k * 3) % 11 - 5); }
static float right(int column, int k) { return static_cast<float>((column * 5 + k * 2) % 13 - 6); }
static float product_of(int row, int column) {
  float sum = 0;
  for (int k = 0; k < 16; ++k) sum += left(row, k) * right(column, k);
  return sum;
}
static uint16_t bits(float value) {
  bf16 out;
  riformer::narrow(value, out);
  return out.bits;
}

template <int Bytes>
static void swizzle() {
  using Theirs = std::conditional_t<Bytes == 128, cute::Swizzle<3, 4, 3>, cute::Swizzle<2, 4, 3>>;
  for (int offset = 0; offset < 4096; ++offset)
    expect(rf::swizzled<Bytes>(offset) == Theirs::apply(offset), "the swizzle", Bytes, offset);
}

// Fills rows of `Bytes` of shared memory from `start` on: `value(row, k)` in the 16 columns of step `at`.
template <int Bytes, class Value>
static void fill(unsigned char* start, int rows, int at, const Value& value) {
  using Theirs = std::conditional_t<Bytes == 128, cute::Swizzle<3, 4, 3>, cute::Swizzle<2, 4, 3>>;
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < 16; ++k) {
      const uint16_t word = bits(value(row, k));
      std::memcpy(start + Theirs::apply(row * Bytes + 32 * at + 2 * k), &word, 2);
    }
}

template <int Bytes>
static uint64_t their_descriptor(uint32_t address) {
  cute::GmmaDescriptor found;
  found.desc_ = 0;
  found.bitfield.start_address_ = static_cast<uint16_t>(address >> 4);
  found.bitfield.leading_byte_offset_ = 1;
  found.bitfield.stride_byte_offset_ = 8 * Bytes / 16;
  found.bitfield.layout_type_ = static_cast<uint8_t>(Bytes == 128 ? gmma::LayoutType::B128 : gmma::LayoutType::B64);
  return found.desc_;
}

template <class Atom, int N, int Bytes>
static void warpgroup(bool from_registers) {
  typename cute::MMA_Traits<Atom>::CLayout held;
  const int step = Bytes / rf::kProductBytes - 1;  // the last of a row
  riformer::emulator::run({1, 1, 128, 64 * Bytes + N * Bytes}, "warpgroup", [&] {
    unsigned char *a = rf::shared_memory(), *b = a + 64 * Bytes;
    const int t = rf::thread_index();
    if (t == 0) {
      fill<Bytes>(a, 64, step, left);
      fill<Bytes>(b, N, step, right);
    }
    rf::fence_async();
    rf::sync_thread_block();
    expect(rf::descriptor<Bytes>(b) == their_descriptor<Bytes>(rf::shared_address(b)), "a descriptor", N, Bytes);
    float d[N / 2];
    uint32_t registers[4] = {};
    if constexpr (Bytes == 128) {
      using Rs = cute::MMA_Traits<cute::SM90_64x64x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>>;
      for (int i = 0; i < 8; ++i) {
        const int index = typename Rs::ALayout{}(t, i);
        registers[i / 2] |= static_cast<uint32_t>(bits(left(index % 64, index / 64))) << (16 * (i % 2));
      }
    }
    const uint64_t second = rf::advanced(rf::descriptor<Bytes>(b), rf::kProductBytes * step);
    rf::product_fence();
    if (from_registers)
      rf::product<bf16, N>(d, registers, second, false);
    else
      rf::product<bf16, N>(d, rf::advanced(rf::descriptor<Bytes>(a), rf::kProductBytes * step), second, false);
    rf::product_commit();
    rf::product_wait<0>();
    for (int i = 0; i < N / 2; ++i) {
      const int index = held(t, i);
      expect(d[i] == product_of(index % 64, index / 64), from_registers ? "a product from registers" : "a product", t,
             i);
    }
  });
}

static void warp() {
  using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  riformer::emulator::run({1, 1, 32, 64}, "warp", [&] {
    const int lane = rf::thread_index();
    uint32_t a[4] = {}, b[2] = {};
    for (int i = 0; i < 8; ++i) {
      const int index = Traits::ALayout{}(lane, i);
      a[i / 2] |= static_cast<uint32_t>(bits(left(index % 16, index / 16))) << (16 * (i % 2));
    }
    for (int i = 0; i < 4; ++i) {
      const int index = Traits::BLayout{}(lane, i);
      b[i / 2] |= static_cast<uint32_t>(bits(right(index % 8, index / 8))) << (16 * (i % 2));
    }
    float d[4] = {};
    rf::multiply_16x8x16<bf16>(d, a, b);
    for (int i = 0; i < 4; ++i) {
      const int index = Traits::CLayout{}(lane, i);
      expect(d[i] == product_of(index % 16, index / 16), "a warp's product", lane, i);
    }
  });
}

int main() {
  constexpr auto K = gmma::Major::K;
  swizzle<128>();
  swizzle<64>();
  warpgroup<cute::SM90_64x64x16_F32BF16BF16_SS<K, K>, 64, 128>(false);
  warpgroup<cute::SM90_64x64x16_F32BF16BF16_SS<K, K>, 64, 64>(false);
  warpgroup<cute::SM90_64x32x16_F32BF16BF16_SS<K, K>, 32, 128>(false);
  warpgroup<cute::SM90::GMMA::MMA_64x160x16_F32BF16BF16_SS<K, K>, 160, 128>(false);
  warpgroup<cute::SM90_64x192x16_F32BF16BF16_RS<K, K>, 192, 128>(true);
  warpgroup<cute::SM90_64x96x16_F32BF16BF16_RS<K, K>, 96, 128>(true);
  warp();
  std::printf("%d disagreements\n", disagreements);
  return disagreements != 0;
}
