// What the kernels other than the matrix products share: sums over threads, the statistics of an image or of a
// position, and pieces of values.
#pragma once

#include <cmath>

#include "device.h"

namespace riformer::cuda {

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sum over `Lanes` neighbouring lanes. They are added by a butterfly, so every lane gets the same bits.
template <int Lanes>
RIFORMER_DEVICE float lane_sum(float value) {
  RIFORMER_UNROLL
  for (int mask = Lanes / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// A team is the threads that compute the statistics of one image together; each takes every size-th channel from
// `index` on. This team is a warp.
struct WarpTeam {
  static constexpr int size = kWarp;
  int index = thread_index() % kWarp;

  RIFORMER_DEVICE float sum(float value) { return lane_sum<kWarp>(value); }
  template <class Value>
  RIFORMER_DEVICE float once(const Value& value) {
    return value();
  }
};

// This team is a thread block of `size` threads. It has two buffers, of kFloats / 2 each, and uses them in turn. A
// thread that writes to a buffer again has passed the barrier of the call in between, before which all threads have
// read it.
struct ThreadBlockTeam {
  static constexpr int kFloats = 64;
  float* shared;
  int size;
  int index = thread_index();
  int turn = 0;

  RIFORMER_DEVICE float* buffer() { return shared + (turn ^= kFloats / 2); }
  RIFORMER_DEVICE float sum(float value) {
    float* const parts = buffer();
    value = lane_sum<kWarp>(value);
    if (index % kWarp == 0) parts[index / kWarp] = value;
    sync_thread_block();
    float total = 0.f;
    for (int warp = 0; warp < size / kWarp; ++warp) total += parts[warp];
    return total;
  }
  // The value as the first warp computes it. For float64, which is slow on GPUs that have few units for it.
  template <class Value>
  RIFORMER_DEVICE float once(const Value& value) {
    float* const place = buffer();
    if (index < kWarp) {
      const float found = value();
      if (index == 0) *place = found;
    }
    sync_thread_block();
    return *place;
  }
};

// The statistics of an image over its channels and positions. `low` is what was lost when mu was rounded to float32.
// For a channel whose mean is m, (m - first) - shift is m - mu without that loss.
struct ImageStatistics {
  float mu, low, rstd, first, shift;
};

// From the moments mean(c) and centred(c) of the channels. The sums are over differences from `first`, which is one of
// the means, so that nothing cancels where the mean is much larger than the deviation. The variance is computed in
// float64: it is one number per image, and its four roundings become one.
template <class Team, class Mean, class Centred>
RIFORMER_DEVICE ImageStatistics image_statistics(Team& team, const Mean& mean, const Centred& centred, float first,
                                                 int channels, int64_t positions, float eps) {
  float sum = 0.f;
  for (int c = team.index; c < channels; c += team.size) sum += mean(c) - first;
  const float shift = team.sum(sum) / static_cast<float>(channels);
  float between = 0.f, within = 0.f;
  for (int c = team.index; c < channels; c += team.size) {
    const float d = (mean(c) - first) - shift;
    between = multiply_add(d, d, between);
    within += centred(c);
  }
  within = team.sum(within);
  const float total = multiply_add(static_cast<float>(positions), team.sum(between), within);
  const float mu = first + shift;
  const float rstd = team.once([&] {
    const double variance = total / (static_cast<double>(positions) * channels);
    return static_cast<float>(1.0 / sqrt(variance + eps));
  });
  return {mu, shift - (mu - first), rstd, first, shift};
}

// --------------------------------------------------------------------------------------------------------- pieces

template <class T>
RIFORMER_DEVICE void unpack_piece(const Vec16& piece, float (&values)[kPerPiece<T>]) {
  static_assert(kIsFloatOr16Bit<T>, "pieces of another kind of element need a form of their own");
  if constexpr (sizeof(T) == 4) {
    std::memcpy(values, &piece, 16);
  } else {
    RIFORMER_UNROLL
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = unpack_low<T>(piece.word[i]);
      values[2 * i + 1] = unpack_high<T>(piece.word[i]);
    }
  }
}

template <class T>
RIFORMER_DEVICE Vec16 pack_piece(const float* values) {
  static_assert(kIsFloatOr16Bit<T>, "pieces of another kind of element need a form of their own");
  Vec16 piece;
  if constexpr (sizeof(T) == 4) {
    std::memcpy(&piece, values, 16);
  } else {
    RIFORMER_UNROLL
    for (int i = 0; i < 4; ++i) piece.word[i] = pack<T>(values[2 * i], values[2 * i + 1]);
  }
  return piece;
}

// Stores `Count` values as elements `at`, at + 1, ... of `out`, in the dtype of `out`; `at` is a multiple of `Count`.
template <int Count>
RIFORMER_DEVICE void store_values(void* out, DType dtype, int64_t at, const float (&values)[Count]) {
  static_assert(Count == 4 || Count == 8, "a piece of float32 or of 16-bit values");
  with_dtype_on_device(dtype, [&](auto element) {
    using Out = decltype(element);
    static_assert(kIsFloatOr16Bit<Out>, "another kind of element needs a store of its own");
    Out* const target = static_cast<Out*>(out) + at;
    if constexpr (Count % kPerPiece<Out> == 0) {
      RIFORMER_UNROLL
      for (int i = 0; i < Count; i += kPerPiece<Out>) store_16(target + i, pack_piece<Out>(values + i));
    } else {
      RIFORMER_UNROLL
      for (int i = 0; i < Count; i += 2) store_word(target + i, pack<Out>(values[i], values[i + 1]));
    }
  });
}

// ---------------------------------------------------------------------------------------- LayerNorm, a row at a time

// A row of tokens, shared by `Lanes` neighbouring lanes: each has every Lanes-th piece. `Held` is how many of them it
// keeps in registers; with 0 every pass over the row reads them again, from the nearest cache.
template <class T, int Lanes, int Held>
struct Row {
  const T* values;
  int pieces;  // 0: a row that does not exist
  int lane = thread_index() % Lanes;
  Vec16 held[Held ? Held : 1];

  RIFORMER_DEVICE Row(const T* from, int count) : values(from), pieces(count) {
    if constexpr (Held > 0) {
      RIFORMER_UNROLL
      for (int i = 0; i < Held; ++i)
        if (lane + i * Lanes < pieces) held[i] = load_16(values + (lane + i * Lanes) * kPerPiece<T>);
    }
  }
  // Calls visit(channel, values) for each piece of this lane.
  template <class Visit>
  RIFORMER_DEVICE void each(const Visit& visit) const {
    float found[kPerPiece<T>];
    if constexpr (Held > 0) {
      RIFORMER_UNROLL
      for (int i = 0; i < Held; ++i)
        if (lane + i * Lanes < pieces) {
          unpack_piece<T>(held[i], found);
          visit((lane + i * Lanes) * kPerPiece<T>, found);
        }
    } else {
      for (int piece = lane; piece < pieces; piece += Lanes) {
        unpack_piece<T>(load_16(values + piece * kPerPiece<T>), found);
        visit(piece * kPerPiece<T>, found);
      }
    }
  }
};

// The statistics of a row. Its mean is first + shift; (value - first) - shift is a value minus the mean without the
// rounding error of that sum.
struct PositionStatistics {
  float first, shift, rstd;
};

template <class T, int Lanes, int Held>
RIFORMER_DEVICE PositionStatistics position_statistics(const Row<T, Lanes, Held>& row, int channels, float eps) {
  const float first = row.pieces ? to_float(*row.values) : 0.f;
  float sum = 0.f, squares = 0.f;
  row.each([&](int, const float (&value)[kPerPiece<T>]) {
    RIFORMER_UNROLL
    for (int i = 0; i < kPerPiece<T>; ++i) sum += value[i] - first;
  });
  const float shift = lane_sum<Lanes>(sum) / static_cast<float>(channels);
  row.each([&](int, const float (&value)[kPerPiece<T>]) {
    RIFORMER_UNROLL
    for (int i = 0; i < kPerPiece<T>; ++i) {
      const float d = (value[i] - first) - shift;
      squares = multiply_add(d, d, squares);
    }
  });
  const float variance = lane_sum<Lanes>(squares) / static_cast<float>(channels);
  return {first, shift, 1.f / sqrtf(variance + eps)};
}

// The statistics of `rows` consecutive rows, by all `threads` threads of a thread block, into shared memory.
template <class T, int Lanes>
RIFORMER_DEVICE void tile_statistics(const T* x, int rows, int channels, float eps, PositionStatistics* found,
                                     int threads) {
  const int group = thread_index() / Lanes;
  // Every thread makes every round, also for rows that do not exist, because the sums take whole warps.
  for (int first = 0; first < rows; first += threads / Lanes) {
    const int row = first + group;
    const Row<T, Lanes, 0> values(x + static_cast<int64_t>(row) * channels, row < rows ? channels / kPerPiece<T> : 0);
    const PositionStatistics statistics = position_statistics(values, channels, eps);
    if (row < rows && thread_index() % Lanes == 0) found[row] = statistics;
  }
  sync_thread_block();
}

// What a thread takes of a tile of rows of `pieces` pieces: the same piece of every `step`-th row. Consecutive threads
// take consecutive pieces. If a row has more pieces than there are threads, all threads share one row, in several
// rounds, and a thread's next piece is `threads` further.
struct TileShare {
  int span, step, row, piece;

  RIFORMER_DEVICE TileShare(int pieces, int threads)
      : span(pieces < threads ? pieces : threads),
        step(threads / span),
        row(thread_index() / span),
        piece(thread_index() % span) {}
  RIFORMER_DEVICE bool idle() const { return row >= step; }
};

// How many lanes share a row, and what each keeps in registers. narrow: 8 lanes, up to 5 pieces each. wide: 32 lanes,
// up to 6 pieces each. any: 32 lanes, which keep nothing.
enum class RowForm { narrow, wide, any };
inline RowForm row_form(int64_t channels, int64_t bytes) {
  const int64_t pieces = channels * bytes / 16;
  return pieces <= 40 ? RowForm::narrow : pieces <= 192 ? RowForm::wide : RowForm::any;
}

}  // namespace riformer::cuda
