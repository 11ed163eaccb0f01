// The matrix product of the engine: rows of weights times a panel of tokens.
//
//     c[row, token] = sum_k weight[row, k] * panel[k, token]
//
// Tokens lie in the vector lanes and the weights are broadcast (or loaded as tile rows) from their own row-major
// layout. So no packed copy of a weight exists anywhere: whatever is written to a parameter is what the next call uses.
// The order of the products in an output depends on k alone, whichever rows and tokens surround it: an image gives the
// same bits alone and in any batch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tiles.h"

namespace riformer::RIFORMER_ISA {

// Panels of float32, [k][kTokens]. A panel is filled two rows at a time; where it is gathered from an image, a cell is
// what its two rows, or each of them, take for one output position.
template <int kTokens_>
struct FloatPanel {
  using Element = float;
  static constexpr int kTokens = kTokens_;
  static constexpr int kCell = 1;  // elements

  static Element* at(Element* panel, int64_t k, int64_t token) { return panel + k * kTokens + token; }

  // As many columns as there are lanes, from `token` on, of rows k and k + 1.
  template <class Lanes>
  static void put(Element* panel, int64_t k, int64_t token, Vec a, Vec b, Lanes lanes) {
    store(a, at(panel, k, token), lanes);
    store(b, at(panel, k + 1, token), lanes);
  }
  // The same, copied from cells; without kSecond row k + 1 is zero.
  template <bool kSecond>
  static void copy(Element* to, const Element* first, const Element* second, int n) {
    put(to, 0, 0, Vec::load_n(first, n), kSecond ? Vec::load_n(second, n) : Vec::zero(), n);
  }
  // One element in every `step`.
  static void fill(const Element* row, int64_t step, int64_t count, Element* to) {
    if (step == 2)
      for (int64_t j = 0; j < count; ++j) to[j] = row[2 * j];
    else if (step == 4)
      for (int64_t j = 0; j < count; ++j) to[j] = row[4 * j];
    else
      for (int64_t j = 0; j < count; ++j) to[j] = row[step * j];
  }
};

#ifdef __AVX512BF16__
// Panels of bfloat16, [k / 2][kTokens][2]: rows k and k + 1 are pairs, and so are cells.
template <int kTokens_>
struct PairPanel {
  using Element = bf16;
  static constexpr int kTokens = kTokens_;
  static constexpr int kCell = 2;

  static Element* at(Element* panel, int64_t k, int64_t token) { return panel + k * kTokens + 2 * token; }  // even k

  static void put(Element* panel, int64_t k, int64_t token, Vec a, Vec b, int n) {
    store_pairs_n(at(panel, k, token), a, b, n);
  }
  static void put(Element* panel, int64_t k, int64_t token, Vec a, Vec b, Full) {
    store_pairs(at(panel, k, token), a, b);
  }
  // Row k takes the first of the pairs at `first`, row k + 1 the second of those at `second`, or zeros.
  template <bool kSecond>
  static void copy(Element* to, const Element* first, const Element* second, int n) {
    constexpr __mmask32 kFirst = 0x55555555;
    const __m512i rest = kSecond ? _mm512_loadu_si512(second) : _mm512_setzero_si512();
    _mm512_mask_storeu_epi32(to, Vec::mask(n), _mm512_mask_loadu_epi16(rest, kFirst, first));
  }
  // Pairs of neighbours, one in every `step` elements.
  static void fill(const Element* row, int64_t step, int64_t count, Element* to) {
    if (step == 4) {
      for (int64_t j = 0; j < count; j += 8)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * j),
                            _mm512_cvtepi64_epi32(_mm512_loadu_si512(row + 4 * j)));
    } else {
      for (int64_t j = 0; j < count; ++j) std::memcpy(to + 2 * j, row + step * j, 2 * sizeof(Element));
    }
  }
};
#endif

// float32 products.
struct GemmFloat32 : FloatPanel<RIFORMER_GEMM_VECTORS * Vec::kLanes> {
  static constexpr int kStep = 1;  // k is padded to a multiple of this
  static constexpr int kRows = RIFORMER_GEMM_ROWS;
  static constexpr int kVectors = RIFORMER_GEMM_VECTORS;
  // A sum of float32 products is taken in chains of this length, which are then added up: one chain over K = 576 has
  // twice the error of oneDNN's convolution (measured), chains of 64 have less than it.
  static constexpr int64_t kChain = 64;

  template <int kUsed>
  static void run(const Element* weight, int64_t stride, const Element* panel, int64_t depth, float* c,
                  bool accumulate) {
    for (int64_t start = 0; start < depth; start += kChain) {
      const int64_t end = start + kChain < depth ? start + kChain : depth;
      Vec acc[kRows][kUsed];
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kUsed; ++j) acc[i][j] = Vec::zero();
      for (int64_t k = start; k < end; ++k) {
        Vec b[kUsed];
        for (int j = 0; j < kUsed; ++j) b[j] = Vec::load(panel + k * kTokens + j * Vec::kLanes);
        for (int i = 0; i < kRows; ++i) {
          const Vec a = Vec::broadcast(weight[i * stride + k]);
          for (int j = 0; j < kUsed; ++j) acc[i][j] = fma(a, b[j], acc[i][j]);
        }
      }
      const bool add = accumulate || start > 0;
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kUsed; ++j) {
          float* to = c + i * kTokens + j * Vec::kLanes;
          (add ? Vec::load(to) + acc[i][j] : acc[i][j]).store(to);
        }
    }
  }

  static Vec gelu(Vec x) { return gelu_float32(x); }
  static void begin() {}
  static void end() {}
};

#ifdef __AVX512BF16__
// bfloat16 products, float32 sums, two k at a time.
struct GemmBfloat16 : PairPanel<RIFORMER_GEMM_VECTORS * Vec::kLanes> {
  static constexpr int kStep = 2;
  static constexpr int kRows = RIFORMER_GEMM_ROWS;
  static constexpr int kVectors = RIFORMER_GEMM_VECTORS;

  template <int kUsed>
  static void run(const Element* weight, int64_t stride, const Element* panel, int64_t depth, float* c,
                  bool accumulate) {
    __m512 acc[kRows][kUsed];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kUsed; ++j)
        acc[i][j] = accumulate ? _mm512_loadu_ps(c + i * kTokens + j * Vec::kLanes) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2) {
      __m512bh b[kUsed];
      for (int j = 0; j < kUsed; ++j) b[j] = (__m512bh)_mm512_loadu_si512(panel + k * kTokens + 2 * j * Vec::kLanes);
      for (int i = 0; i < kRows; ++i) {
        int pair;
        std::memcpy(&pair, weight + i * stride + k, 4);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
        for (int j = 0; j < kUsed; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], a, b[j]);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kUsed; ++j) _mm512_storeu_ps(c + i * kTokens + j * Vec::kLanes, acc[i][j]);
  }

  static Vec gelu(Vec x) { return gelu_bfloat16(x); }
  static void begin() {}
  static void end() {}
};
#endif

// Working memory of a task, apart from weights. With 16-bit elements twice as much pays off, as sums and panels are
// passed over half as often for each of their bytes (bench/NOTES.md).
template <class Gemm>
constexpr int64_t task_bytes() {
  return RIFORMER_TASK_BYTES * 4 / static_cast<int64_t>(sizeof(typename Gemm::Element));
}

// The kernel for as many vectors of tokens as are in use: a ragged last panel costs what it holds.
template <class Gemm, int kUsed = Gemm::kVectors>
inline void multiply(int vectors, const typename Gemm::Element* weight, int64_t stride,
                     const typename Gemm::Element* panel, int64_t depth, float* c, bool accumulate) {
  if constexpr (kUsed > 1) {
    if (vectors < kUsed) {
      multiply<Gemm, kUsed - 1>(vectors, weight, stride, panel, depth, c, accumulate);
      return;
    }
  }
  Gemm::template run<kUsed>(weight, stride, panel, depth, c, accumulate);
}

// The product that serves tokens of element type T. Each instruction set says it for every type (kernels_*.cpp): there
// is no definition for "all others", so that a type that nobody thought of does not compile.
template <class T>
struct GemmFor;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Between equal types bit by bit; a conversion flushes bfloat16's subnormal numbers.
template <class From, class To>
inline void copy_row(const From* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    constexpr int64_t kRun = 16;
    int64_t k = 0;
    for (; k + kRun <= n; k += kRun) std::memcpy(static_cast<void*>(to + k), from + k, kRun * sizeof(To));
    for (; k < n; ++k) to[k] = from[k];
    return;
  }
  for_each_vector(n, [&](int64_t k, auto lanes) { store(load(from + k, lanes), to + k, lanes); });
}

// Rows of a weight matrix as the product reads them.
template <class Gemm>
struct WeightRows {
  const typename Gemm::Element* data;
  int64_t stride;
};

// Rows [row, row + kRows) on their way into the cache, for the next call. Worth its instructions when the weights come
// from memory, that is for the first panel that they meet: a row block is eight short runs, too many for the hardware
// to follow.
template <class Gemm>
inline void fetch_rows(const WeightRows<Gemm>& weight, int64_t row, int64_t end, int64_t depth) {
  const int64_t bytes = depth * static_cast<int64_t>(sizeof(typename Gemm::Element));
  for (int64_t i = row; i < row + Gemm::kRows && i < end; ++i) {
    const char* from = reinterpret_cast<const char*>(weight.data + i * weight.stride);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
  }
}

// A weight matrix, multiplied in chunks of input channels: the parameter's own memory where dtype and padding allow it,
// otherwise a converted copy that lives as long as the call.
template <class Gemm>
struct Weights {
  using Element = typename Gemm::Element;

  Parameter from;
  int64_t rows, channels, taps, chunk;  // a row has channels * taps elements
  bool channels_last;                   // taps outside, channels inside; otherwise the other way round
  Element* copy = nullptr;

  int64_t chunk_channels(int64_t first) const { return channels - first < chunk ? channels - first : chunk; }
  int64_t depth(int64_t first) const { return chunk_channels(first) * taps; }
  int64_t padded_depth(int64_t first) const { return round_up(depth(first), Gemm::kStep); }
  int64_t padded_rows() const { return round_up(rows, Gemm::kRows); }

  bool reads_parameter() const {
    return from.dtype == ElementTraits<Element>::kDType && rows % Gemm::kRows == 0 && (!channels_last || taps == 1) &&
           chunk * taps % Gemm::kStep == 0 && channels * taps % Gemm::kStep == 0;
  }
  int64_t copy_elements() const {
    return reads_parameter()
               ? 0
               : padded_rows() * (channels / chunk * padded_depth(0) + padded_depth(channels / chunk * chunk));
  }

  // The rows of the chunk that starts at channel `first`.
  WeightRows<Gemm> at(int64_t first) const {
    if (!copy) return {static_cast<const Element*>(from.data) + first * taps, channels * taps};
    return {copy + first / chunk * padded_depth(0) * padded_rows(), padded_depth(first)};
  }

  template <class From>
  void copy_rows_from(const From* matrix, int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < channels; first += chunk) {
      const WeightRows<Gemm> to = at(first);
      const int64_t segments = channels_last ? taps : 1, length = depth(first) / segments;
      for (int64_t row = begin; row < end; ++row) {
        Element* out = const_cast<Element*>(to.data) + row * to.stride;
        int64_t filled = 0;
        if (row < rows) {
          const From* in = matrix + row * channels * taps + (channels_last ? first : first * taps);
          for (int64_t s = 0; s < segments; ++s, filled += length) copy_row(in + s * channels, length, out + filled);
        }
        std::memset(static_cast<void*>(out + filled), 0, static_cast<size_t>(to.stride - filled) * sizeof(Element));
      }
    }
  }
  void copy_rows(int64_t begin, int64_t end) const {
    with_values(from, [&](const auto* matrix) { copy_rows_from(matrix, begin, end); });
  }

  static void run_copy(int64_t begin, int64_t end, void* context) {
    static_cast<const Weights*>(context)->copy_rows(begin, end);
  }
  // Makes the copy, if there has to be one, in `memory` (copy_elements).
  void prepare(const Pool& pool, Element* memory) {
    if (reads_parameter()) return;
    copy = memory;
    pool.run(padded_rows(), &run_copy, this);
  }
};

}  // namespace riformer::RIFORMER_ISA
