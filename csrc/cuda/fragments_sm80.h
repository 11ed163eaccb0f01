// What the sm_80 kernels of a block are made of, for 16-bit tokens: swizzled tiles in shared memory, fragments of
// mma.m16n8k16, and what happens to a fragment before the first product (the norm) and after the second (layer scale
// and residual). A fragment is what one lane holds of an operand or of the sums; multiply_16x8x16 in device.h says
// what.
//
// The fused kernel and the pair of kernels give the same bits because both are made of these functions. Every element
// of a product is one chain of additions, k upwards in steps of 16, and what happens before and after is the same code.
#pragma once

#include "block_args.h"
#include "gelu.h"

namespace riformer::cuda::sm80 {

// A tile in shared memory, `Pieces` pieces to a row, rows directly after each other. The pieces of a row are exchanged
// (an XOR swizzle) so that the same piece of eight consecutive rows lies in eight different groups of banks: those
// eight are what ldmatrix reads at a time.
template <int Pieces>
struct SwizzledTile {
  // How many pieces are exchanged with each other. With an odd number of pieces to a row the rows lie in different
  // banks without an exchange. The more often 2 divides that number, the more of the eight rows would share a bank.
  static constexpr int kSpan = Pieces % 8 == 0 ? 8 : Pieces % 4 == 0 ? 4 : Pieces % 2 == 0 ? 2 : 1;
  static constexpr int kPitch = 16 * Pieces;
  RIFORMER_HOST_DEVICE static constexpr int exchange(int row) { return row / (8 / kSpan) % kSpan; }
  RIFORMER_HOST_DEVICE static constexpr int offset(int row, int piece) {
    return row * kPitch + 16 * (piece ^ exchange(row));
  }
};

// The row and the piece whose address a lane gives to load_matrix_x4, which reads four matrices of 8 rows x 1 piece. An
// operand a of 16 rows x 2 pieces: rows 0-7 and 8-15 of piece 0, then of piece 1. An operand b of 16 columns (rows of
// the weight): pieces 0 and 1 of rows 0-7, then of rows 8-15.
struct LaneOfA {
  static RIFORMER_DEVICE int row(int lane) { return lane % 16; }
  static RIFORMER_DEVICE int piece(int lane) { return lane / 16; }
};
struct LaneOfB {
  static RIFORMER_DEVICE int row(int lane) { return lane % 8 + lane / 16 * 8; }
  static RIFORMER_DEVICE int piece(int lane) { return lane / 8 % 2; }
};

// Loads operands of 16 rows x 16 k from a tile in shared memory.
template <int Pieces, class Lane>
struct TileReader {
  const unsigned char* base;
  int exchanged;  // byte offset of the lane's piece after the exchange, for k = 0

  RIFORMER_DEVICE TileReader(const unsigned char* tile, int lane)
      : base(tile + Lane::row(lane) * SwizzledTile<Pieces>::kPitch),
        exchanged(16 * (Lane::piece(lane) ^ SwizzledTile<Pieces>::exchange(Lane::row(lane)))) {}
  // `row` is a multiple of 16, so that the exchange depends on the lane alone.
  RIFORMER_DEVICE void load(uint32_t (&out)[4], int row, int k) const {
    load_matrix_x4(out, base + row * SwizzledTile<Pieces>::kPitch + ((2 * k) ^ exchanged));
  }
};

// Starts the copies of a tile from global memory, by all `Threads` threads. What is not below `rows` and `pieces`
// becomes zero. The rows that a thread copies are a multiple of eight apart, so that they have the same exchange, and
// the addresses of all copies of a thread differ by constants.
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

// What differs between the rows of a slot. image: nothing, as the slot belongs to one image. images: the maps, as the
// slot crosses images. position: the statistics, with LayerNorm.
enum class RowMode { image, images, position };

inline RowMode row_mode(const BlockKernelArgs& args) {
  return args.statistics ? RowMode::position : args.slots_per_image ? RowMode::image : RowMode::images;
}

// Calls `act` with the mode as a type, whose `value` is a constant.
template <class Act>
void with_row_mode(const BlockKernelArgs& args, const Act& act) {
  switch (row_mode(args)) {
    case RowMode::image: return act(std::integral_constant<RowMode, RowMode::image>{});
    case RowMode::images: return act(std::integral_constant<RowMode, RowMode::images>{});
    case RowMode::position: return act(std::integral_constant<RowMode, RowMode::position>{});
  }
}

// A slot, and where its first row is. Kept in shared memory, so that it occupies no registers and is computed only
// once.
struct SlotPlace {
  Slot slot;
  int64_t image, position;  // of the first row; 0 where the mode does not need it
};

constexpr int kPlaceBytes = 128;  // of shared memory, for the places of a thread block's slots

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

// The maps and statistics of the rows of a warp's fragments: `Tiles` times 16 rows, all in one slot. Of each 16, lane l
// has rows l / 4 and l / 4 + 8.
template <int Tiles, RowMode Mode>
struct WarpRows {
  static constexpr int kRows = 2 * Tiles, kImages = Mode == RowMode::images ? kRows : 1;
  static constexpr int kStatistics = Mode == RowMode::image ? 1 : kRows;
  const float* maps;    // those of the slot's first image
  int images[kImages];  // of each row, counted from that image
  RowStatistics statistics[kStatistics];

  // `first`: the warp's first row, counted from the slot's. Rows behind the end of a slot take the statistics of its
  // first row; nobody reads their results.
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
      // 32 bits are enough, as images have few positions where slots cross them.
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

// The maps of the four channels that a lane has of a step of 16 k: c = k + 2 (l % 4), c + 1, c + 8 and c + 9.
template <bool PerPosition>
struct ChannelMaps {
  static constexpr int kFirst = PerPosition ? 0 : 2;  // of u, w, P, Q; z of GroupNorm needs P and Q alone
  Pair value[4 - kFirst][2];

  // `channel`: the first of the four. Beyond `channels` the maps are zero, and so is z.
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

// Replaces x by z in the fragments of one step of 16 k. `maps` are those of the slot's first image; for rows of other
// images they are loaded here.
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

// Replaces x by the block's result in a tile of shared memory, from the second product's sums. `tile` starts at the
// warp's first row. The sums' first column is in piece `piece` of the tile, and is `channel` of all channels.
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
