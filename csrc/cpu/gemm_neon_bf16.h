// bfloat16 products with Arm's BFMMLA, and the panels that it reads.
//
// BFMMLA multiplies 2 x 4 weights with 4 x 2 values of tokens and adds the 2 x 2 results to float32 sums. BFDOT, which
// would fit pairs of rows and a broadcast weight, has half the multiply-adds at the same rate of instructions.
//
// Both round as the architecture says for bfloat16 before FEAT_EBF16: each product, the sum of two and the sum in the
// register are rounded to odd, and subnormal numbers count as zero. That is at most one unit of float32's last place
// each, 2^-16 of what storing a result as bfloat16 rounds by.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace riformer::RIFORMER_ISA {

// Panels of bfloat16, [k / 4][kTokens][4]: four rows of a token are neighbours. A cell is two of them, for even k.
template <int kTokens_>
struct QuadPanel {
  using Element = bf16;
  static constexpr int kTokens = kTokens_;
  static constexpr int kCell = 2;  // elements

  static Element* at(Element* panel, int64_t k, int64_t token) {
    return panel + k / 4 * 4 * kTokens + 4 * token + k % 4;
  }

  // Writes one vector to row k and one to row k + 1, from `token` on.
  static void put(Element* panel, int64_t k, int64_t token, Vec a, Vec b, AllLanes) {
    store_cells(cells_of(a, b), at(panel, k, token));
  }
  static void put(Element* panel, int64_t k, int64_t token, Vec a, Vec b, int n) {
    Element* to = at(panel, k, token);
    const uint32x4x2_t cells = cells_of(a, b);
    if (n >= Vec::kLanes) {
      store_cells(cells, to);
      return;
    }
    uint32_t buffer[Vec::kLanes];
    vst1q_u32(buffer, cells.val[0]);
    vst1q_u32(buffer + 4, cells.val[1]);
    for (int i = 0; i < n; ++i) std::memcpy(static_cast<void*>(to + 4 * i), buffer + i, 4);
  }
  // Fills n cells at `to`: the first element from the cells at `first`, the second from those at `second`, or zero
  // without kSecond.
  template <bool kSecond>
  static void copy(Element* to, const Element* first, const Element* second, int n) {
    for (int i = 0; i < n; ++i) {
      to[4 * i] = first[2 * i];
      to[4 * i + 1] = kSecond ? second[2 * i + 1] : Element{0};
    }
  }
  // Makes `count` cells: the cell j is row[step * j] and its neighbour.
  static void take_every(const Element* row, int64_t step, int64_t count, Element* to) {
    for (int64_t j = 0; j < count; ++j) std::memcpy(static_cast<void*>(to + 2 * j), row + step * j, 4);
  }

 private:
  // Two vectors rounded to bfloat16 and interleaved lane by lane.
  static uint32x4x2_t cells_of(Vec a, Vec b) {
    const uint16x8_t first = a.narrow_bf16(), second = b.narrow_bf16();
    return {vreinterpretq_u32_u16(vzip1q_u16(first, second)), vreinterpretq_u32_u16(vzip2q_u16(first, second))};
  }
  // Cells of neighbouring tokens, which are four elements apart. By memcpy, which GCC makes one store of a lane:
  // through a uint32_t* the compiler could take them for other memory than what the product loads.
  static void store_cells(uint32x4x2_t cells, Element* to) {
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 4; ++i) {
        const uint32_t cell = cells.val[half][i];
        std::memcpy(static_cast<void*>(to + 16 * half + 4 * i), &cell, 4);
      }
  }
};

// bfloat16 products, float32 sums.
struct GemmBfloat16 : QuadPanel<3 * Vec::kLanes> {
  static constexpr int kStep = 8;  // a register of weights is eight of one row
  static constexpr int kRows = RIFORMER_GEMM_ROWS;
  // One more than the float32 product has: the four `zip` of eight columns of weights are then paid by 48 products and
  // not by 32.
  static constexpr int kVectors = 3;
  static constexpr int64_t kMostRest = 0;
  static constexpr bool kFetches = false;

  // A register of sums belongs to two rows and two tokens: (row 0, token 0), (0, 1), (1, 0), (1, 1).
  // Not inlined, for the reason in gemm_neon.h.
  template <int kUsed>
  __attribute__((noinline)) static void run(const Element* weight, int64_t stride, const Element* panel, int64_t depth,
                                            float* c, bool accumulate) {
    constexpr int kPairs = kUsed * Vec::kLanes / 2;  // of tokens
    float32x4_t acc[kRows / 2][kPairs];
    // The sums so far, into registers: what stands in two rows changes places.
    for (int i = 0; i < kRows / 2; ++i)
      for (int j = 0; j < kPairs; j += 2) {
        const float* upper = c + 2 * i * kTokens + 2 * j;
        const float32x4_t zero = vdupq_n_f32(0.f);
        exchange(accumulate ? vld1q_f32(upper) : zero, accumulate ? vld1q_f32(upper + kTokens) : zero, &acc[i][j],
                 &acc[i][j + 1]);
      }
    for (int64_t k = 0; k < depth; k += kStep) {
      uint64x2_t a[kRows];
      for (int i = 0; i < kRows; ++i)
        a[i] = vreinterpretq_u64_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(weight + i * stride + k)));
      uint64x2_t first[kRows / 2], second[kRows / 2];
      for (int i = 0; i < kRows / 2; ++i) {
        first[i] = vzip1q_u64(a[2 * i], a[2 * i + 1]);
        second[i] = vzip2q_u64(a[2 * i], a[2 * i + 1]);
      }
      add_rows(first, panel + k * kTokens, acc);
      add_rows(second, panel + (k + 4) * kTokens, acc);
    }
    // The sums, back to memory.
    for (int i = 0; i < kRows / 2; ++i)
      for (int j = 0; j < kPairs; j += 2) {
        float32x4_t upper, lower;
        exchange(acc[i][j], acc[i][j + 1], &upper, &lower);
        float* to = c + 2 * i * kTokens + 2 * j;
        vst1q_f32(to, upper);
        vst1q_f32(to + kTokens, lower);
      }
  }

  static Vec gelu(Vec x) { return gelu_bfloat16(x); }
  static void begin() {}
  static void end() {}

 private:
  // The low halves of both, then the high halves of both.
  static void exchange(float32x4_t a, float32x4_t b, float32x4_t* low, float32x4_t* high) {
    const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
    *low = vreinterpretq_f32_f64(vzip1q_f64(x, y));
    *high = vreinterpretq_f32_f64(vzip2q_f64(x, y));
  }
  // Adds four rows of the panel times four columns of weights.
  template <int kPairs>
  static void add_rows(const uint64x2_t (&a)[kRows / 2], const Element* rows, float32x4_t (&acc)[kRows / 2][kPairs]) {
    for (int j = 0; j < kPairs; ++j) {
      const bfloat16x8_t b = vreinterpretq_bf16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(rows + 8 * j)));
      for (int i = 0; i < kRows / 2; ++i) acc[i][j] = vbfmmlaq_f32(acc[i][j], vreinterpretq_bf16_u64(a[i]), b);
    }
  }
};

}  // namespace riformer::RIFORMER_ISA
