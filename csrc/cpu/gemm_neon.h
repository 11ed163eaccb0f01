// float32 products with Arm's multiply-add by element: one operand is a lane of a register.
//
// A weight is then broadcast by the multiply-add itself. GemmFloat32 has an instruction of its own for that (`ld1r`),
// which takes a slot of the pipelines that multiply (bench/notes/2026-11-21-cpu-aarch64.md).
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "gemm.h"

namespace riformer::RIFORMER_ISA {

struct GemmByElement : GemmFloat32 {
  static constexpr bool kFetches = false;
  static constexpr int kStep = 4;  // the lanes of a register of weights

  // Not inlined, as GCC 12 then finds registers for all sums; so does the flag in instruction_sets.def. Together they
  // took the loop from 105 instructions, of them 3 on the stack, to 88 with none, 64 of which multiply.
  template <int kUsed>
  __attribute__((noinline)) static void run(const Element* weight, int64_t stride, const Element* panel, int64_t depth,
                                            float* c, bool accumulate) {
    constexpr int kQuads = 2 * kUsed;  // registers of four tokens
    for (int64_t start = 0; start < depth; start += kChain) {
      // One chain, with its sums in registers.
      const int64_t end = start + kChain < depth ? start + kChain : depth;
      float32x4_t acc[kRows][kQuads];
      for (auto& row : acc)
        for (auto& sum : row) sum = vdupq_n_f32(0.f);
      for (int64_t k = start; k < end; k += kStep) {
        float32x4_t a[kRows];
        for (int i = 0; i < kRows; ++i) a[i] = vld1q_f32(weight + i * stride + k);
        add_row<0>(a, panel + k * kTokens, acc);
        add_row<1>(a, panel + (k + 1) * kTokens, acc);
        add_row<2>(a, panel + (k + 2) * kTokens, acc);
        add_row<3>(a, panel + (k + 3) * kTokens, acc);
      }
      // The chain is added to those before it.
      const bool add = accumulate || start > 0;
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kQuads; ++j) {
          float* to = c + i * kTokens + 4 * j;
          vst1q_f32(to, add ? vaddq_f32(vld1q_f32(to), acc[i][j]) : acc[i][j]);
        }
    }
  }

 private:
  // Adds one row of the panel times the weights in lane kLane of `a`.
  template <int kLane, int kQuads>
  static void add_row(const float32x4_t (&a)[kRows], const Element* row, float32x4_t (&acc)[kRows][kQuads]) {
    for (int j = 0; j < kQuads; ++j) {
      const float32x4_t b = vld1q_f32(row + 4 * j);
      for (int i = 0; i < kRows; ++i) acc[i][j] = vfmaq_laneq_f32(acc[i][j], b, a[i], kLane);
    }
  }
};

}  // namespace riformer::RIFORMER_ISA
