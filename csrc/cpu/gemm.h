// The matrix product of the engine: rows of weights times a panel of tokens.
//
//     c[row, token] = sum_k weight[row, k] * panel[k, token]
//
// Tokens lie in the vector lanes. A weight is read from its own row-major memory and broadcast (or loaded as a row of
// an AMX tile), so no packed copy of a weight exists anywhere: whatever is written to a parameter is what the next call
// uses. The order of the sum in an output depends on k alone, whichever rows and tokens surround it: an image gives the
// same bits alone and in any batch.
//
// A product ("Gemm" as a template parameter) is a panel type (panel.h) that also offers:
//   kStep              k is padded with zeros to a multiple of this
//   kRows, kVectors    one call computes kRows rows of weights times up to kVectors vectors of tokens
//   run<kUsed>(...)    that call, for the first kUsed vectors of the panel; see `multiply`
//   kFetches           whether there is a run<kUsed, true>, which also fetches the next kRows rows of weights
//   kMostRest          the most tokens of a tile that is multiplied as a rest (rests.h); 0 for none
//   add_products(...)  where kMostRest is not 0: products along k; see rests.h
//   gelu(x)            GELU as exact as results of this product need it
//   begin(), end()     called by a thread before its first and after its last product of a task loop
//
// Each kernels_*.cpp sets, for the sizes of its registers and caches:
//   RIFORMER_GEMM_ROWS, RIFORMER_GEMM_VECTORS    kRows and kVectors of the products that keep their sums in registers
//   RIFORMER_TASK_BYTES                          see task_bytes
#pragma once

#include <cstdint>

#include "panel.h"
#include "prefetch.h"
#include "vec_math.h"

namespace riformer::RIFORMER_ISA {

// The most tokens of a rest (rests.h), for products whose vectors have kLanes tokens: fewer than a vector, and at most
// 4. The 14x14 and the 7x7 positions of a 224 px image leave 4 and 1.
constexpr int64_t most_rest() { return Vec::kLanes > 4 ? 4 : Vec::kLanes - 1; }

// The product that serves tokens of element type T. Each kernels_*.cpp says it for every type. There is no definition
// for "all others", so that a new type does not compile until somebody has chosen its product.
template <class T>
struct GemmFor;

// float32 products.
struct GemmFloat32 : FloatPanel<RIFORMER_GEMM_VECTORS * Vec::kLanes> {
  static constexpr int kStep = 1;
  static constexpr int kRows = RIFORMER_GEMM_ROWS;
  static constexpr int kVectors = RIFORMER_GEMM_VECTORS;
  // A sum is taken in chains of this many products, which are then added up. One chain over K = 576 has twice the error
  // of oneDNN's convolution, chains of 64 have less than it (measured).
  static constexpr int64_t kChain = 64;

  static constexpr bool kFetches = true;

  // With kFetch, a line of each of the next rows is fetched every 16 steps. All of them at once would hold up the
  // product's own loads: a core can wait for some twenty lines at a time
  // (bench/notes/2026-11-22-cpu-rests-and-fetching.md).
  template <int kUsed, bool kFetch = false>
  static void run(const Element* weight, int64_t stride, const Element* panel, int64_t depth, float* c,
                  bool accumulate) {
    for (int64_t start = 0; start < depth; start += kChain) {
      // One chain, with its sums in registers.
      const int64_t end = start + kChain < depth ? start + kChain : depth;
      Vec acc[kRows][kUsed];
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kUsed; ++j) acc[i][j] = Vec::zero();
      const auto add = [&](int64_t k) {
        Vec b[kUsed];
        for (int j = 0; j < kUsed; ++j) b[j] = Vec::load(panel + k * kTokens + j * Vec::kLanes);
        for (int i = 0; i < kRows; ++i) {
          const Vec a = Vec::broadcast(weight[i * stride + k]);
          for (int j = 0; j < kUsed; ++j) acc[i][j] = fma(a, b[j], acc[i][j]);
        }
      };
      if constexpr (kFetch) {
        constexpr int64_t kLine = kCacheLine / sizeof(Element);
        for (int64_t line = start; line < end; line += kLine) {
          for (int i = 0; i < kRows; ++i) __builtin_prefetch(weight + (kRows + i) * stride + line);
          const int64_t stop = line + kLine < end ? line + kLine : end;
          for (int64_t k = line; k < stop; ++k) add(k);
        }
      } else {
        for (int64_t k = start; k < end; ++k) add(k);
      }
      // The chain is added to those before it.
      const bool follows = accumulate || start > 0;
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kUsed; ++j) {
          float* to = c + i * kTokens + j * Vec::kLanes;
          (follows ? Vec::load(to) + acc[i][j] : acc[i][j]).store(to);
        }
    }
  }

  static constexpr int64_t kMostRest = most_rest();
  static constexpr int64_t kAlong = Vec::kLanes;  // elements of one vector along k

  static Vec add_products(const Element* weight, const Element* token, AllLanes, Vec sum) {
    return fma(Vec::load(weight), Vec::load(token), sum);
  }
  static Vec add_products(const Element* weight, const Element* token, int n, Vec sum) {
    return fma(Vec::load_n(weight, n), Vec::load_n(token, n), sum);
  }

  static Vec gelu(Vec x) { return gelu_float32(x); }
  static void begin() {}
  static void end() {}
};

// The working memory that a task should take, without weights. With 16-bit elements it is twice as much, as sums and
// panels are then passed over half as often for each of their bytes (bench/notes/2026-11-21-cpu-panels-and-tasks.md).
template <class Gemm>
constexpr int64_t task_bytes() {
  return RIFORMER_TASK_BYTES * 4 / static_cast<int64_t>(sizeof(typename Gemm::Element));
}

// Prefetches kRows rows of weights, `stride` apart.
template <class Gemm>
inline void prefetch_rows(const typename Gemm::Element* weight, int64_t stride, int64_t depth) {
  for (int i = 0; i < Gemm::kRows; ++i)
    prefetch(weight + i * stride, depth * static_cast<int64_t>(sizeof(typename Gemm::Element)));
}

// c[kRows][kTokens] = or += kRows rows of weights, `stride` apart, times the panel. Calls the `run` for as many vectors
// as hold tokens, so that a ragged last panel costs what it holds. With `fetch`, the next kRows rows are fetched
// meanwhile. That is worth its instructions when the weights come from memory, which is for the first panel that they
// meet: kRows short rows are too many for the hardware to follow.
template <class Gemm, int kUsed = Gemm::kVectors>
inline void multiply(int vectors, const typename Gemm::Element* weight, int64_t stride,
                     const typename Gemm::Element* panel, int64_t depth, float* c, bool accumulate, bool fetch) {
  if constexpr (kUsed > 1) {
    if (vectors < kUsed) {
      multiply<Gemm, kUsed - 1>(vectors, weight, stride, panel, depth, c, accumulate, fetch);
      return;
    }
  }
  if (fetch) {
    if constexpr (Gemm::kFetches) {
      Gemm::template run<kUsed, true>(weight, stride, panel, depth, c, accumulate);
      return;
    }
    prefetch_rows<Gemm>(weight + Gemm::kRows * stride, stride, depth);
  }
  Gemm::template run<kUsed>(weight, stride, panel, depth, c, accumulate);
}

}  // namespace riformer::RIFORMER_ISA
