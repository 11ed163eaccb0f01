// Weights as signed bytes with a scale per row, made anew in each call, and the dot products that correct the biases.
//
// Quantising shifts a product's result by nearly the same amount at all positions of an image, since the channels have
// means. Such errors add up in what is averaged over positions, so they are taken out, with means per image:
//   fc1    z is quantised without its mean, and W1 mean(z) is computed in float32 (kResidual false)
//   fc2    (W2 - quantised W2) mean(hidden) is added (kResidual true), with an estimate of the mean
// The float weights pass by for the bytes anyway, so each dot product is taken in the same pass.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>

#include "gemm_int8.h"
#include "memory.h"
#include "parameters.h"

namespace riformer::RIFORMER_ISA {

// Scales are not smaller than this, so that their reciprocals are finite. Weights below it count as zero.
constexpr float kSmallestRange = 1e-30f;

struct Int8Weights {
  Parameter from;
  int64_t rows, depth, chunk;        // a row's `depth` elements in chunks, of which the last may be shorter
  int8_t* values;                    // [chunk][row][elements of the chunk]
  float *scales, *sums;              // [chunk][row]: the scale, and the sum of the bytes
  std::atomic<int64_t> bad_row{-1};  // a row with a value that is not finite

  Int8Weights(const Parameter& from_, int64_t rows_, int64_t depth_, int64_t chunk_)
      : from(from_), rows(rows_), depth(depth_), chunk(chunk_ < depth_ ? chunk_ : depth_) {}

  int64_t chunks() const { return (depth + chunk - 1) / chunk; }
  int64_t length(int64_t first) const { return depth - first < chunk ? depth - first : chunk; }
  const int8_t* at(int64_t first, int64_t row) const { return values + first * rows + row * length(first); }
  const float* scale(int64_t first) const { return scales + first / chunk * rows; }
  const float* sum(int64_t first) const { return sums + first / chunk * rows; }

  void take(Arena& arena) {
    values = arena.take<int8_t>(rows * depth);
    scales = arena.take<float>(chunks() * rows);
    sums = arena.take<float>(chunks() * rows);
  }
};

// One row: the scale of every chunk. Returns whether all values are finite.
template <class W>
inline bool find_scales(const W* row, const Int8Weights& weights, int64_t index) {
  bool finite = true;
  for (int64_t first = 0; first < weights.depth; first += weights.chunk) {
    Vec top = Vec::zero();
    for_each_vector(weights.length(first),
                    [&](int64_t k, auto lanes) { top = larger_size(top, load(row + first + k, lanes)); });
    const float range = largest_size(top);
    finite = finite && range - range == 0.f;
    weights.scales[first / weights.chunk * weights.rows + index] =
        (range > kSmallestRange ? range : kSmallestRange) / 127.f;
  }
  return finite;
}

// One row: its bytes, their sums, and its dot products with kCount vectors (see above). Returns the row's sum of
// squares.
template <bool kResidual, int kCount, class W>
inline float quantise_row(const W* row, const Int8Weights& weights, int64_t index, const float* const* vectors,
                          Vec* dots) {
  Vec total[kCount], square = Vec::zero();
  for (int i = 0; i < kCount; ++i) total[i] = Vec::zero();
  for (int64_t first = 0; first < weights.depth; first += weights.chunk) {
    const int64_t length = weights.length(first), at = first / weights.chunk * weights.rows + index;
    int8_t* to = weights.values + first * weights.rows + index * length;
    const Vec scale = Vec::broadcast(weights.scales[at]), inverse = Vec::broadcast(1.f / weights.scales[at]);
    Vec sum = Vec::zero();  // exact, as it is whole and below 2^24
    for_each_vector(length, [&](int64_t k, auto lanes) {
      const Vec value = load(row + first + k, lanes), whole = nearest(value * inverse);
      put_signed(to + k, whole, lanes);
      sum = sum + whole;
      if (!kResidual) square = fma(value, value, square);
      const Vec factor = kResidual ? value - scale * whole : value;
      for (int i = 0; i < kCount; ++i) total[i] = fma(factor, load(vectors[i] + first + k, lanes), total[i]);
    });
    weights.sums[at] = sum.sum();
  }
  for (int i = 0; i < kCount; ++i) dots[i] = total[i];
  return square.sum();
}

// The same for up to kLanes vectors, of which `count` are there; the others count as the last one. Lane i of *dots
// becomes the dot product with vector i. Its sum is taken in an order that depends on neither `count` nor i.
template <bool kResidual, class W>
inline float quantise_row(const W* row, const Int8Weights& weights, int64_t index, const float* vectors, int64_t pitch,
                          int64_t count, Vec* dots) {
  const float* each[Vec::kLanes];
  for (int64_t i = 0; i < Vec::kLanes; ++i) each[i] = vectors + (i < count ? i : count - 1) * pitch;
  Vec totals[Vec::kLanes];
  for (auto& total : totals) total = Vec::zero();
  float square;
  if (count == 1) {
    square = quantise_row<kResidual, 1>(row, weights, index, each, totals);
  } else if (Vec::kLanes > 4 && count <= 4) {
    square = quantise_row < kResidual, Vec::kLanes<4 ? 1 : 4>(row, weights, index, each, totals);
  } else {
    square = quantise_row<kResidual, Vec::kLanes>(row, weights, index, each, totals);
  }
  *dots = lane_sums(totals);
  return square;
}

}  // namespace riformer::RIFORMER_ISA
