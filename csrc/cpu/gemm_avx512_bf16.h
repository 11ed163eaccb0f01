// bfloat16 products with AVX-512 BF16's vdpbf16ps, and the panels that they and AMX tiles read.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace riformer::RIFORMER_ISA {

// Two vectors rounded to bfloat16 and interleaved lane by lane: a_0, b_0, a_1, b_1, ...
inline __m512i pairs(Vec a, Vec b) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
}

// Panels of bfloat16, [k / 2][kTokens][2]: the elements of rows k and k + 1 are neighbours, for even k. A cell is such
// a pair.
template <int kTokens_>
struct PairPanel {
  using Element = bf16;
  static constexpr int kTokens = kTokens_;
  static constexpr int kCell = 2;  // elements

  static Element* at(Element* panel, int64_t k, int64_t token) { return panel + k * kTokens + 2 * token; }

  static Element get(const Element* panel, int64_t k, int64_t token) {
    return panel[k / 2 * 2 * kTokens + 2 * token + k % 2];
  }

  // Writes one vector to row k and one to row k + 1, from `token` on.
  static void put(Element* panel, int64_t k, int64_t token, Vec a, Vec b, int n) {
    _mm512_mask_storeu_epi32(at(panel, k, token), Vec::mask(n), pairs(a, b));
  }
  static void put(Element* panel, int64_t k, int64_t token, Vec a, Vec b, AllLanes) {
    _mm512_storeu_si512(at(panel, k, token), pairs(a, b));
  }
  // Fills n pairs at `to`: the first element from the cells at `first`, the second from those at `second`, or zero
  // without kSecond.
  template <bool kSecond>
  static void copy(Element* to, const Element* first, const Element* second, int n) {
    constexpr __mmask32 kFirst = 0x55555555;
    const __m512i rest = kSecond ? _mm512_loadu_si512(second) : _mm512_setzero_si512();
    _mm512_mask_storeu_epi32(to, Vec::mask(n), _mm512_mask_loadu_epi16(rest, kFirst, first));
  }
  // Makes `count` cells: the cell j is row[step * j] and its neighbour.
  static void take_every(const Element* row, int64_t step, int64_t count, Element* to) {
    if (step == 4) {
      for (int64_t j = 0; j < count; j += 8)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * j),
                            _mm512_cvtepi64_epi32(_mm512_loadu_si512(row + 4 * j)));
    } else {
      for (int64_t j = 0; j < count; ++j) std::memcpy(to + 2 * j, row + step * j, 2 * sizeof(Element));
    }
  }
};

// bfloat16 products, float32 sums. One instruction multiplies a pair of rows k and k + 1.
struct GemmBfloat16 : PairPanel<RIFORMER_GEMM_VECTORS * Vec::kLanes> {
  static constexpr int kStep = 2;
  static constexpr int kRows = RIFORMER_GEMM_ROWS;
  static constexpr int kVectors = RIFORMER_GEMM_VECTORS;

  static constexpr bool kFetches = true;

  // kFetch is as in GemmFloat32.
  template <int kUsed, bool kFetch = false>
  static void run(const Element* weight, int64_t stride, const Element* panel, int64_t depth, float* c,
                  bool accumulate) {
    // The sums so far, into registers.
    __m512 acc[kRows][kUsed];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kUsed; ++j)
        acc[i][j] = accumulate ? _mm512_loadu_ps(c + i * kTokens + j * Vec::kLanes) : _mm512_setzero_ps();
    // Every pair of k: the panel's vectors stay in registers while the rows' weights are broadcast one by one.
    const auto add = [&](int64_t k) {
      __m512bh b[kUsed];
      for (int j = 0; j < kUsed; ++j) b[j] = (__m512bh)_mm512_loadu_si512(panel + k * kTokens + 2 * j * Vec::kLanes);
      for (int i = 0; i < kRows; ++i) {
        int pair;
        std::memcpy(&pair, weight + i * stride + k, 4);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
        for (int j = 0; j < kUsed; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], a, b[j]);
      }
    };
    if constexpr (kFetch) {
      constexpr int64_t kLine = kCacheLine / sizeof(Element);
      for (int64_t line = 0; line < depth; line += kLine) {
        for (int i = 0; i < kRows; ++i) __builtin_prefetch(weight + (kRows + i) * stride + line);
        const int64_t stop = line + kLine < depth ? line + kLine : depth;
        for (int64_t k = line; k < stop; k += 2) add(k);
      }
    } else {
      for (int64_t k = 0; k < depth; k += 2) add(k);
    }
    // The sums, back to memory.
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kUsed; ++j) _mm512_storeu_ps(c + i * kTokens + j * Vec::kLanes, acc[i][j]);
  }

  static constexpr int64_t kMostRest = most_rest();
  static constexpr int64_t kAlong = 2 * Vec::kLanes;  // elements of one vector along k

  static Vec add_products(const Element* weight, const Element* token, AllLanes, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_loadu_si512(weight), (__m512bh)_mm512_loadu_si512(token))};
  }
  static Vec add_products(const Element* weight, const Element* token, int n, Vec sum) {
    const __mmask32 mask = (1u << n) - 1;
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_maskz_loadu_epi16(mask, weight),
                             (__m512bh)_mm512_maskz_loadu_epi16(mask, token))};
  }

  static Vec gelu(Vec x) { return gelu_bfloat16(x); }
  static void begin() {}
  static void end() {}
};

}  // namespace riformer::RIFORMER_ISA
