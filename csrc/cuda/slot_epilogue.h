// The end of every kernel that writes tokens: a slot's rounded values lie in shared memory, from where they are
// stored in pieces of 16 bytes and their moments are taken.
#pragma once

#include "block_args.h"

namespace riformer::cuda {

// `slot_moments` for a Full slot of 64 rows, or for any.
template <class T, bool Full, class At>
RIFORMER_DEVICE void moments_of_rows(const At& at, int rows, int pieces, int warp, int warps, float* mean,
                                     int64_t channels) {
  constexpr int kColumns = 4 / sizeof(T);  // in a word, which is what a lane has of each of its rows
  constexpr int kRows = kSlotRows / 8;     // of a lane
  const int lane = opaque(thread_index()) % kWarp, row = lane / 4, word = lane % 4;
  const auto inside = [&](int i) { return Full || row + 8 * i < rows; };
  const float count = static_cast<float>(rows), part = 1.f / count;
  RIFORMER_NO_UNROLL
  for (int piece = warp; piece < pieces; piece += warps) {
    float value[kColumns][kRows];
    RIFORMER_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const void* const place = at(row + 8 * i, piece);
      const uint32_t bits = load_word(static_cast<const unsigned char*>(place) + 4 * word);
      if constexpr (kColumns == 2) {
        value[0][i] = unpack_low<T>(bits);
        value[kColumns - 1][i] = unpack_high<T>(bits);
      } else {
        std::memcpy(&value[0][i], &bits, 4);
      }
    }
    float means[kColumns], centred[kColumns];
    RIFORMER_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      float sum = 0.f;
      RIFORMER_UNROLL
      for (int i = 0; i < kRows; ++i) sum += inside(i) ? value[c][i] : 0.f;
      RIFORMER_UNROLL
      for (int mask = 4; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
      means[c] = sum * part;
      float left = 0.f, squares = 0.f;
      RIFORMER_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const float d = inside(i) ? value[c][i] - means[c] : 0.f;
        left += d;
        squares = multiply_add(d, d, squares);
      }
      RIFORMER_UNROLL
      for (int mask = 4; mask < kWarp; mask *= 2) {
        left += shuffle_xor(left, mask);
        squares += shuffle_xor(squares, mask);
      }
      // The mean's own rounding error, which matters where the mean is large: one more sum corrects both results.
      const float shift = left * part;
      const float corrected = multiply_add(-count * shift, shift, squares);
      means[c] += shift;
      centred[c] = corrected < 0.f ? 0.f : corrected;  // in this form a NaN stays one
    }
    if (row == 0) {
      float* const target = mean + static_cast<int64_t>(piece) * (4 * kColumns) + word * kColumns;
      RIFORMER_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        target[c] = means[c];
        target[channels + c] = centred[c];
      }
    }
  }
}

// The moments of `rows` (1 to 64) rows of values of T, as they are stored, for `pieces` pieces of 16 bytes of
// columns.
//
// `at(row, piece)` is where 16 bytes of a row lie; rows to 63 must exist, what the rest of a short slot holds does
// not matter. `mean` is where the mean of the first column belongs, `channels` floats before its centred sum of
// squares: of a whole slot, `args.partials + slot * 2 * C`. Warp `warp` of `warps` takes every warps-th piece. No
// barrier inside: the caller synchronises between the stores to shared memory and this.
//
// A column's sums have one order whatever the layout, the tile and the number of warps: eight sums over the rows r, r
// + 8, ... upwards, put together by a butterfly. So kernels that store the same values leave the same bits. Eight
// lanes read eight rows of a piece at a time, which has no bank conflict wherever ldmatrix has none, and the values
// stay in registers for the second pass: 2 bytes of shared memory and about 9 instructions a value (of 16 bits).
template <class T, class At>
RIFORMER_DEVICE void slot_moments(const At& at, int rows, int pieces, int warp, int warps, float* mean,
                                  int64_t channels) {
  if (rows == kSlotRows)
    moments_of_rows<T, true>(at, rows, pieces, warp, warps, mean, channels);
  else
    moments_of_rows<T, false>(at, rows, pieces, warp, warps, mean, channels);
}

// Rows 0 to rows - 1 of `pieces` pieces of 16 bytes to `out`, whose rows are `pitch` bytes apart. Threads that follow
// each other write pieces that do.
template <class At>
RIFORMER_DEVICE void store_slot(const At& at, int rows, int pieces, void* out, int64_t pitch, int thread, int threads) {
  for (int i = thread; i < rows * pieces; i += threads) {
    const int row = i / pieces, piece = i - row * pieces;
    store_16(static_cast<unsigned char*>(out) + row * pitch + 16 * piece, load_16(at(row, piece)));
  }
}

}  // namespace riformer::cuda
