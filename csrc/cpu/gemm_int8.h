// int8 products: signed weights times unsigned tokens, in exact int32 sums. `Ints` is in ints_*.h.
#pragma once

#include <cstdint>

#include "gemm.h"

#define RIFORMER_UNROLL _Pragma("GCC unroll 8")

namespace riformer::RIFORMER_ISA {

// Panels of bytes, [k / 4][kTokens][4]: the bytes of rows k to k + 3 are neighbours, for k a multiple of 4.
struct GemmInt8 {
  using Element = uint8_t;
  static constexpr int kTokens = RIFORMER_GEMM_VECTORS * Vec::kLanes;
  static constexpr int kStep = 4;
  static constexpr int kRows = RIFORMER_GEMM_ROWS;
  static constexpr int kVectors = RIFORMER_GEMM_VECTORS;
  static constexpr int64_t kMostRest = 0;

  static Element* at(Element* panel, int64_t k, int64_t token) { return panel + k * kTokens + 4 * token; }

  // sums[kRows][kTokens] = kRows rows of weights, `stride` apart, times the first kUsed vectors of a panel. The loops
  // are unrolled by name, as GCC 12 otherwise passes the sums through memory after the loop. Not inlined, so that it
  // has the registers to itself.
  template <int kUsed>
  [[gnu::noinline]] static void run(const int8_t* weight, int64_t stride, const Element* panel, int64_t depth,
                                    int32_t* sums) {
    Ints acc[kRows][kUsed];
    RIFORMER_UNROLL for (int i = 0; i < kRows; ++i) {
      RIFORMER_UNROLL for (int j = 0; j < kUsed; ++j) acc[i][j] = Ints::zero();
    }
    for (int64_t k = 0; k < depth; k += 4) {
      Ints b[kUsed];
      RIFORMER_UNROLL for (int j = 0; j < kUsed; ++j) b[j] = Ints::load(panel + k * kTokens + 4 * j * Vec::kLanes);
      RIFORMER_UNROLL for (int i = 0; i < kRows; ++i) {
        const Ints a = Ints::broadcast(weight + i * stride + k);
        RIFORMER_UNROLL for (int j = 0; j < kUsed; ++j) add_dot(acc[i][j], b[j], a);
      }
    }
    RIFORMER_UNROLL for (int i = 0; i < kRows; ++i) {
      RIFORMER_UNROLL for (int j = 0; j < kUsed; ++j) store(acc[i][j], sums + i * kTokens + j * Vec::kLanes);
    }
  }

  static void begin() {}
  static void end() {}
};

// `run` for as many vectors as hold tokens.
template <int kUsed = GemmInt8::kVectors>
inline void multiply_int8(int vectors, const int8_t* weight, int64_t stride, const uint8_t* panel, int64_t depth,
                          int32_t* sums) {
  if constexpr (kUsed > 1) {
    if (vectors < kUsed) {
      multiply_int8<kUsed - 1>(vectors, weight, stride, panel, depth, sums);
      return;
    }
  }
  GemmInt8::run<kUsed>(weight, stride, panel, depth, sums);
}

}  // namespace riformer::RIFORMER_ISA
