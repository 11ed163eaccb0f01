// Weight matrices as the products read them: the parameter's own memory where that is possible.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"
#include "parameters.h"

namespace riformer::RIFORMER_ISA {

using cpu::Pool;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Copies n elements, converted where the types differ. Between equal types it copies the bits, since a conversion
// flushes bfloat16's subnormal numbers.
template <class From, class To>
inline void copy_row(const From* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    constexpr int64_t kAtOnce = 16;
    int64_t k = 0;
    for (; k + kAtOnce <= n; k += kAtOnce) std::memcpy(static_cast<void*>(to + k), from + k, kAtOnce * sizeof(To));
    for (; k < n; ++k) to[k] = from[k];
    return;
  }
  for_each_vector(n, [&](int64_t k, auto lanes) { store(load(from + k, lanes), to + k, lanes); });
}

// Rows of a weight matrix, `stride` elements apart.
template <class Gemm>
struct WeightRows {
  const typename Gemm::Element* data;
  int64_t stride;
};

// A weight matrix, multiplied in chunks of input channels. Where dtype and padding allow it, the product reads the
// parameter itself, otherwise a converted copy that lives as long as the call.
template <class Gemm>
struct Weights {
  using Element = typename Gemm::Element;

  Parameter from;
  int64_t rows, channels, taps;  // a row has channels * taps elements; taps is 1 but for convolutions
  int64_t chunk;                 // channels per chunk; the last chunk may have fewer
  bool channels_last;            // a row is [taps][channels]; otherwise [channels][taps]
  Element* copy = nullptr;

  int64_t chunk_channels(int64_t first) const { return channels - first < chunk ? channels - first : chunk; }
  // Elements of a row in the chunk that starts at channel `first`.
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

  // The rows of the chunk that starts at channel `first`. A copy holds one chunk after the other.
  WeightRows<Gemm> at(int64_t first) const {
    if (!copy) return {static_cast<const Element*>(from.data) + first * taps, channels * taps};
    return {copy + first / chunk * padded_depth(0) * padded_rows(), padded_depth(first)};
  }

  // Fills rows [begin, end) of every chunk of the copy, with zeros for the padding.
  template <class From>
  void copy_rows_from(const From* matrix, int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < channels; first += chunk) {
      const WeightRows<Gemm> to = at(first);
      // Stretches of the parameter's row that belong to this chunk: one for each tap, or a single one.
      const int64_t stretches = channels_last ? taps : 1, length = depth(first) / stretches;
      for (int64_t row = begin; row < end; ++row) {
        Element* out = const_cast<Element*>(to.data) + row * to.stride;
        int64_t filled = 0;
        if (row < rows) {
          const From* in = matrix + row * channels * taps + (channels_last ? first : first * taps);
          for (int64_t s = 0; s < stretches; ++s, filled += length) copy_row(in + s * channels, length, out + filled);
        }
        std::memset(static_cast<void*>(out + filled), 0, static_cast<size_t>(to.stride - filled) * sizeof(Element));
      }
    }
  }
  static void run_copy(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const Weights*>(context);
    with_values(self.from, [&](const auto* matrix) { self.copy_rows_from(matrix, begin, end); });
  }

  // Makes the copy, if there has to be one, in `memory` (copy_elements).
  void prepare(const Pool& pool, Element* memory) {
    if (reads_parameter()) return;
    copy = memory;
    pool.run(padded_rows(), &run_copy, this);
  }
};

}  // namespace riformer::RIFORMER_ISA
