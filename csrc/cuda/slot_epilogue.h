// The end of every kernel that writes tokens. The results of a slot, rounded, lie in shared memory; from there they are
// stored in pieces, and their moments are taken.
#pragma once

#include "block_args.h"

namespace riformer::cuda {

// `slot_moments`, for a slot of 64 rows if `Full`, otherwise for any.
template <class T, bool Full, class At>
RIFORMER_DEVICE void moments_of_rows(const At& at, int rows, int pieces, int warp, int warps, float* mean,
                                     int64_t channels) {
  constexpr int kColumns = 4 / sizeof(T);  // of a lane: those of a word
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
      // `left` is what the mean's rounding error leaves over. It corrects both results, which matters for a large mean.
      const float shift = left * part;
      const float corrected = multiply_add(-count * shift, shift, squares);
      means[c] += shift;
      centred[c] = corrected < 0.f ? 0.f : corrected;  // unlike a maximum, this keeps a NaN
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

// Takes the moments of `rows` rows (1 to 64) and of the columns in `pieces` pieces. `at(row, piece)` is where a piece
// lies in shared memory; 64 rows must exist, but those behind `rows` do not count. `mean` is where the mean of the
// first column goes, and its centred sum of squares goes `channels` floats further. Of `warps` warps, warp `warp` takes
// every warps-th piece. There is no barrier inside: the caller synchronises after the stores to shared memory.
//
// The order of a column's sums depends on nothing but the row: eight sums over rows r, r + 8, ... upwards, which a
// butterfly adds. So kernels that store the same values leave the same bits. Eight lanes read the same piece of eight
// rows at a time, without a bank conflict wherever ldmatrix has none, and keep it in registers for the second pass.
template <class T, class At>
RIFORMER_DEVICE void slot_moments(const At& at, int rows, int pieces, int warp, int warps, float* mean,
                                  int64_t channels) {
  if (rows == kSlotRows)
    moments_of_rows<T, true>(at, rows, pieces, warp, warps, mean, channels);
  else
    moments_of_rows<T, false>(at, rows, pieces, warp, warps, mean, channels);
}

// Stores `rows` rows of `pieces` pieces to `out`, whose rows are `pitch` bytes apart. Consecutive threads store
// consecutive pieces.
template <class At>
RIFORMER_DEVICE void store_slot(const At& at, int rows, int pieces, void* out, int64_t pitch, int thread, int threads) {
  for (int i = thread; i < rows * pieces; i += threads) {
    const int row = i / pieces, piece = i - row * pieces;
    store_16(static_cast<unsigned char*>(out) + row * pitch + 16 * piece, load_16(at(row, piece)));
  }
}

}  // namespace riformer::cuda
