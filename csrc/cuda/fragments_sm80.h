// What the sm_80 matrix kernels are made of: swizzled tiles in shared memory, fragments of mma.m16n8k16, and what
// happens to them on the way in (the norm) and on the way out (layer scale and residual).
//
// The fused kernel and the pair of kernels give the same bits because both are made of these functions: every element
// of a product is one chain of additions, k upwards in steps of 16, and what surrounds it is computed by the same
// code.
#pragma once

#include "block_args.h"
#include "gelu.h"

namespace riformer::cuda::sm80 {

// A tile of `Pieces` pieces of 16 bytes (8 values) a row, rows directly after each other. Pieces are exchanged within
// a row so that 8 rows of one column of pieces lie in 8 different banks of 16 bytes, which is what ldmatrix reads at
// a time.
template <int Pieces>
struct SwizzledTile {
  // Rows of an odd number of pieces differ in their banks by themselves; 2 and 4 leave the rest to the exchange.
  static constexpr int kSpan = Pieces % 8 == 0 ? 8 : Pieces % 4 == 0 ? 4 : Pieces % 2 == 0 ? 2 : 1;
  static constexpr int kPitch = 16 * Pieces;
  RIFORMER_HOST_DEVICE static constexpr int exchange(int row) { return row / (8 / kSpan) % kSpan; }
  RIFORMER_HOST_DEVICE static constexpr int offset(int row, int piece) {
    return row * kPitch + 16 * (piece ^ exchange(row));
  }
};

// Where ldmatrix.x4 reads for this lane: matrices 0 and 1 are rows 0-7 and 8-15 for an operand of rows (a); pieces 0
// and 1 of rows 0-7 for one of columns (b). Their `row` is a multiple of 16, so that the exchange depends on the lane
// alone.
struct LaneOfA {
  static RIFORMER_DEVICE int row(int lane) { return lane % 16; }
  static RIFORMER_DEVICE int piece(int lane) { return lane / 16; }
};
struct LaneOfB {
  static RIFORMER_DEVICE int row(int lane) { return lane % 8 + lane / 16 * 8; }
  static RIFORMER_DEVICE int piece(int lane) { return lane / 8 % 2; }
};

// Reads 16 x 16 blocks of a tile whose `base` is in shared memory.
template <int Pieces, class Lane>
struct TileReader {
  const unsigned char* base;
  int exchanged;  // 16 times the lane's piece with the exchange applied; the k step's pieces are applied to that

  RIFORMER_DEVICE TileReader(const unsigned char* tile, int lane)
      : base(tile + Lane::row(lane) * SwizzledTile<Pieces>::kPitch),
        exchanged(16 * (Lane::piece(lane) ^ SwizzledTile<Pieces>::exchange(Lane::row(lane)))) {}
  RIFORMER_DEVICE void load(uint32_t (&out)[4], int row, int k) const {
    load_matrix_x4(out, base + row * SwizzledTile<Pieces>::kPitch + ((2 * k) ^ exchanged));
  }
};

// `Rows` rows of a tile from global memory, asynchronously, by `Threads` threads; zeros where a row is not below
// `rows` or a piece not below `pieces`. Threads go down the rows in steps of whole exchanges, so each keeps one
// address for all its copies but for constants.
template <int Pieces, int Rows, int Threads>
RIFORMER_DEVICE void copy_tile(unsigned char* to, const void* from, int64_t pitch, int rows, int pieces) {
  using Tile = SwizzledTile<Pieces>;
  constexpr int kWide = Tile::kSpan, kStep = Threads / kWide;
  static_assert(Threads % kWide == 0 && kStep % 8 == 0, "a step has to keep the exchange");
  const int row = thread_index() / kWide, piece = thread_index() % kWide;
  unsigned char* const target = to + Tile::offset(row, piece);
  const unsigned char* const source = static_cast<const unsigned char*>(from) + row * pitch + 16 * piece;
  RIFORMER_UNROLL
  for (int r = 0; r < Rows; r += kStep) {
    if (Rows % kStep && row + r >= Rows) break;
    RIFORMER_UNROLL
    for (int p = 0; p < Pieces; p += kWide)
      copy_async_16(target + r * Tile::kPitch + 16 * p, source + r * pitch + 16 * p,
                    row + r < rows && piece + p < pieces);
  }
}

// Which of its numbers differ between the rows of a slot: none (one image to a slot), the maps (slots over several
// images), or the statistics (LayerNorm).
enum class RowMode { image, images, position };

inline RowMode row_mode(const BlockKernelArgs& args) {
  return args.statistics ? RowMode::position : args.slots_per_image ? RowMode::image : RowMode::images;
}

// `act` on the args' mode as a type with a constant `value`.
template <class Act>
void with_row_mode(const BlockKernelArgs& args, const Act& act) {
  switch (row_mode(args)) {
    case RowMode::image: return act(std::integral_constant<RowMode, RowMode::image>{});
    case RowMode::images: return act(std::integral_constant<RowMode, RowMode::images>{});
    case RowMode::position: return act(std::integral_constant<RowMode, RowMode::position>{});
  }
}

// A slot, and where it is in its images. In shared memory it costs no registers meanwhile and its divisions are done
// once.
struct SlotPlace {
  Slot slot;
  int64_t image, position;  // of its first row; what LayerNorm does not need is 0
};

constexpr int kPlaceBytes = 128;  // of shared memory, for those of a thread block

template <RowMode Mode>
RIFORMER_DEVICE SlotPlace place_of(const BlockKernelArgs& args, int64_t index) {
  SlotPlace place{{0, 0}, 0, 0};
  if (index >= slot_count(args.rows, args.positions, args.slots_per_image)) return place;
  place.slot = slot_at(index, args.rows, args.positions, args.slots_per_image);
  if (Mode == RowMode::image) place.image = index / args.slots_per_image;
  if (Mode == RowMode::images) {
    place.image = place.slot.first / args.positions;
    place.position = place.slot.first - place.image * args.positions;
  }
  return place;
}

// The rows of a warp's fragments: `Tiles` times 16, all in one slot. A lane has two of each 16: l / 4 and 8 further.
template <int Tiles, RowMode Mode>
struct WarpRows {
  static constexpr int kRows = 2 * Tiles, kImages = Mode == RowMode::images ? kRows : 1;
  static constexpr int kStatistics = Mode == RowMode::image ? 1 : kRows;
  const float* maps;    // of the image of the slot's first row
  int images[kImages];  // counted from that image
  RowStatistics statistics[kStatistics];

  // `first`: the warp's first row in its slot. Rows that do not exist take the numbers of the slot's first, or of row
  // 0.
  RIFORMER_DEVICE void find(const BlockKernelArgs& args, const SlotPlace& place, int first, int lane) {
    maps = args.maps + place.image * 5 * args.channels;
    images[0] = 0;
    RIFORMER_UNROLL
    for (int i = 0; i < kStatistics; ++i) {
      const int row = first + lane / 4 + 8 * i;
      const bool inside = row < place.slot.rows;
      if (Mode == RowMode::position) {
        statistics[i] = row_statistics(args, inside ? place.slot.first + row : place.slot.first, maps);
        continue;
      }
      // Images have few positions where slots cross them: 32 bits are enough.
      if (Mode == RowMode::images)
        images[i] =
            inside
                ? static_cast<int>(static_cast<uint32_t>(place.position + row) / static_cast<uint32_t>(args.positions))
                : 0;
      statistics[i] = {maps_of(i, args.channels)[4 * args.channels], 1.f, 0.f, 1.f};
    }
  }
  RIFORMER_DEVICE int image(int i) const { return images[Mode == RowMode::images ? i : 0]; }
  RIFORMER_DEVICE const RowStatistics& row(int i) const { return statistics[Mode == RowMode::image ? 0 : i]; }
  RIFORMER_DEVICE const float* maps_of(int i, int channels) const {
    return maps + static_cast<int64_t>(image(i)) * 5 * channels;
  }
};

// The maps of the four channels that a lane has of a k step of 16: k + 2 (l % 4) and the next, and both 8 further.
template <bool PerPosition>
struct ChannelMaps {
  static constexpr int kFirst = PerPosition ? 0 : 2;  // u, w, P, Q; GroupNorm's z needs P and Q alone
  Pair value[4 - kFirst][2];

  // `channel`: the first of the four. Zeros, which make z zero, beyond `channels`.
  RIFORMER_DEVICE void load(const float* maps, int channel, int channels) {
    RIFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int c = channel + 8 * half;
      RIFORMER_UNROLL
      for (int i = kFirst; i < 4; ++i)
        value[i - kFirst][half] = c < channels ? load_pair(maps + i * channels + c) : Pair{{0.f, 0.f}};
    }
  }
  template <class T>
  RIFORMER_DEVICE uint32_t normed_word(uint32_t x, const RowStatistics& row, int half) const {
    float z[2] = {unpack_low<T>(x), unpack_high<T>(x)};
    RIFORMER_UNROLL
    for (int e = 0; e < 2; ++e)
      z[e] = normed<PerPosition>(z[e], row, value[0][half].value[e], value[1][half].value[e],
                                 value[2 - kFirst][half].value[e], value[3 - kFirst][half].value[e]);
    return pack<T>(z[0], z[1]);
  }
};

// x to z, in place, in the fragments of one k step. `maps` are those of the slot's first image; rows of other images
// load their own.
template <class T, int Tiles, RowMode Mode>
RIFORMER_DEVICE void norm_fragments(uint32_t (&a)[Tiles][4], const WarpRows<Tiles, Mode>& rows,
                                    ChannelMaps<Mode == RowMode::position> maps, int channel, int channels) {
  int image = 0;
  RIFORMER_UNROLL
  for (int i = 0; i < 2 * Tiles; ++i) {
    if (Mode == RowMode::images && rows.image(i) != image) {
      image = rows.image(i);
      maps.load(rows.maps_of(i, channels), channel, channels);
    }
    RIFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t& word = a[i / 2][i % 2 + 2 * half];
      word = maps.template normed_word<T>(word, rows.row(i), half);
    }
  }
}

// The second product's sums, finished and rounded, into the tile that holds x, each value in the place of its own x.
// `tile`: at the warp's first row; `piece`: that of the sums' first column, which is `channel` of all.
template <class T, int Pieces, int Tiles, RowMode Mode, int Columns>
RIFORMER_DEVICE void finish_fragments(const BlockKernelArgs& args, const WarpRows<Tiles, Mode>& rows,
                                      unsigned char* tile, int piece, int channel,
                                      const float (&sums)[Tiles][Columns][4], int lane) {
  const float* const scales = args.constants + args.hidden;
  RIFORMER_UNROLL
  for (int n = 0; n < Columns; ++n) {
    if (channel + 8 * n >= args.channels) break;
    const int c = channel + 8 * n + 2 * (lane % 4);
    const Pair scale = load_pair(scales + c), shift = load_pair(scales + args.channels + c);
    Pair u = load_pair(rows.maps + c), w = load_pair(rows.maps + args.channels + c);
    int image = 0;
    RIFORMER_UNROLL
    for (int i = 0; i < 2 * Tiles; ++i) {
      if (Mode == RowMode::images && rows.image(i) != image) {
        image = rows.image(i);
        const float* const maps = rows.maps_of(i, args.channels);
        u = load_pair(maps + c);
        w = load_pair(maps + args.channels + c);
      }
      auto* const word = reinterpret_cast<uint32_t*>(tile + SwizzledTile<Pieces>::offset(lane / 4 + 8 * i, piece + n) +
                                                     4 * (lane % 4));
      const float x[2] = {unpack_low<T>(*word), unpack_high<T>(*word)};
      float y[2];
      RIFORMER_UNROLL
      for (int e = 0; e < 2; ++e)
        y[e] = finished(x[e], rows.row(i), u.value[e], w.value[e], sums[i / 2][n][i % 2 * 2 + e], scale.value[e],
                        shift.value[e], args.residual);
      *word = pack<T>(y[0], y[1]);
    }
  }
}

}  // namespace riformer::cuda::sm80
