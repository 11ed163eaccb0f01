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

namespace riformer::RIFORMER_ISA {

// float32 products. Panel layout: [k][kTokens] floats.
struct GemmFloat32 {
  using Element = float;
  static constexpr int kStep = 1;  // k is padded to a multiple of this
  static constexpr int kRows = RIFORMER_GEMM_ROWS;
  static constexpr int kCopiedRows = 4 * kRows;
  static constexpr int kVectors = RIFORMER_GEMM_VECTORS;
  static constexpr int kTokens = kVectors * Vec::kLanes;
  // A sum of float32 products is taken in chains of this length, which are then added up: one chain over K = 576 has
  // twice the error of oneDNN's convolution (measured), chains of 64 have less than it.
  static constexpr int64_t kChain = 64;

  static Element* at(Element* panel, int64_t k, int token) { return panel + k * kTokens + token; }

  // Columns [token, token + n) of rows k and k + 1.
  static void put(Element* panel, int64_t k, int token, Vec a, Vec b, int n) {
    a.store_n(at(panel, k, token), n);
    b.store_n(at(panel, k + 1, token), n);
  }

  template <int kUsed>
  static void run(const Element* weight, int64_t stride, const Element* panel, int64_t depth, float* c, bool accumulate) {
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
// bfloat16 products, float32 sums, two k at a time. Panel layout: [k / 2][kTokens][2].
struct GemmBfloat16 {
  using Element = bf16;
  static constexpr int kStep = 2;
  static constexpr int kRows = RIFORMER_GEMM_ROWS;
  static constexpr int kCopiedRows = 4 * kRows;
  static constexpr int kVectors = RIFORMER_GEMM_VECTORS;
  static constexpr int kTokens = kVectors * Vec::kLanes;

  static Element* at(Element* panel, int64_t k, int token) { return panel + k * kTokens + 2 * token; }  // even k

  static void put(Element* panel, int64_t k, int token, Vec a, Vec b, int n) {
    store_pairs_n(at(panel, k, token), a, b, n);
  }

  template <int kUsed>
  static void run(const Element* weight, int64_t stride, const Element* panel, int64_t depth, float* c, bool accumulate) {
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

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows of a weight matrix as the product wants them: the parameter's own memory where dtype and padding allow it,
// otherwise a converted copy of just these rows, made anew each time.
template <class Gemm>
struct WeightRows {
  const typename Gemm::Element* data;
  int64_t stride;
};

template <class From>
inline void copy_row(const From* from, int64_t n, int64_t padded, float* to) {
  int64_t k = 0;
  for (; k + Vec::kLanes <= n; k += Vec::kLanes) Vec::load(from + k).store(to + k);
  if (k < n) Vec::load_n(from + k, static_cast<int>(n - k)).store_n(to + k, static_cast<int>(n - k));
  for (k = n; k < padded; ++k) to[k] = 0.f;
}
template <class From>
inline void copy_row(const From* from, int64_t n, int64_t padded, bf16* to) {
  int64_t k = 0;
  for (; k + Vec::kLanes <= n; k += Vec::kLanes) Vec::load(from + k).store(to + k);
  if (k < n) Vec::load_n(from + k, static_cast<int>(n - k)).store_n(to + k, static_cast<int>(n - k));
  for (k = n; k < padded; ++k) to[k].bits = 0;
}

// A weight matrix or a part of it: `rows` rows that start `offset` into a parameter, `stride` apart. A row is `segments`
// runs of `length` elements, `gap` from start to start.
struct WeightPart {
  const void* matrix;
  DType dtype;
  int64_t offset, stride, rows, length;
  int64_t segments = 1, gap = 0;
};

template <class Gemm, class From>
inline void copy_rows(const From* from, const WeightPart& part, int64_t rows, int64_t padded_rows, int64_t padded,
                      typename Gemm::Element* to) {
  for (int64_t i = 0; i < padded_rows; ++i) {
    typename Gemm::Element* row = to + i * padded;
    const int64_t segments = i < rows ? part.segments : 0;
    for (int64_t s = 0; s < segments; ++s)
      copy_row(from + i * part.stride + s * part.gap, part.length, part.length, row + s * part.length);
    const int64_t filled = segments * part.length;
    copy_row(from, 0, padded - filled, row + filled);
  }
}

template <class Gemm>
inline bool reads_parameter(const WeightPart& part, int64_t padded_depth) {
  constexpr DType kNative = sizeof(typename Gemm::Element) == 4 ? DType::f32 : DType::bf16;
  return part.dtype == kNative && part.rows % Gemm::kRows == 0 && part.segments == 1 &&
         part.length == padded_depth;
}

// How many rows are made ready at once: all of them where the product reads the parameter itself, otherwise as many as
// keep a converted copy small.
template <class Gemm>
inline int64_t rows_at_once(const WeightPart& part, int64_t padded_depth) {
  return reads_parameter<Gemm>(part, padded_depth) ? part.rows : Gemm::kCopiedRows;
}

// Rows [first, first + count) of `part`; `scratch` holds kCopiedRows * padded_depth elements.
template <class Gemm>
inline WeightRows<Gemm> weight_rows(const WeightPart& part, int64_t first, int64_t count, int64_t padded_depth,
                                    typename Gemm::Element* scratch) {
  const int64_t offset = part.offset + first * part.stride;
  if (reads_parameter<Gemm>(part, padded_depth))
    return {static_cast<const typename Gemm::Element*>(part.matrix) + offset, part.stride};
  const int64_t padded_rows = round_up(count, Gemm::kRows);
  if (part.dtype == DType::f32)
    copy_rows<Gemm>(static_cast<const float*>(part.matrix) + offset, part, count, padded_rows, padded_depth, scratch);
  else if (part.dtype == DType::bf16)
    copy_rows<Gemm>(static_cast<const bf16*>(part.matrix) + offset, part, count, padded_rows, padded_depth, scratch);
  else
    copy_rows<Gemm>(static_cast<const f16*>(part.matrix) + offset, part, count, padded_rows, padded_depth, scratch);
  return {scratch, padded_depth};
}

// The product of `part` with every panel: done(panel, row, rows, vectors, c) is called for blocks of at most kRows rows,
// `c` being where(panel, row) with what stood there added if `accumulate`. A panel stays in the first-level cache while
// the rows pass by.
template <class Gemm, class Where, class Done>
inline void multiply_panels(const WeightPart& part, const typename Gemm::Element* panels, int64_t tokens,
                            int64_t padded_depth, bool accumulate, typename Gemm::Element* scratch, Where where,
                            Done done) {
  const int64_t panel_count = (tokens + Gemm::kTokens - 1) / Gemm::kTokens;
  const int64_t at_once = rows_at_once<Gemm>(part, padded_depth);
  for (int64_t first = 0; first < part.rows; first += at_once) {
    const int64_t count = part.rows - first < at_once ? part.rows - first : at_once;
    const auto weights = weight_rows<Gemm>(part, first, count, padded_depth, scratch);
    for (int64_t p = 0; p < panel_count; ++p) {
      const int64_t left = (tokens - p * Gemm::kTokens + Vec::kLanes - 1) / Vec::kLanes;
      const int vectors = static_cast<int>(left < Gemm::kVectors ? left : Gemm::kVectors);
      for (int64_t r = 0; r < count; r += Gemm::kRows) {
        const int64_t rows = count - r < Gemm::kRows ? count - r : Gemm::kRows;
        float* c = where(p, first + r);
        multiply<Gemm>(vectors, weights.data + r * weights.stride, weights.stride,
                       panels + p * padded_depth * Gemm::kTokens, padded_depth, c, accumulate);
        done(p, first + r, rows, vectors, c);
      }
    }
  }
}

}  // namespace riformer::RIFORMER_ISA
