// The block as a pair of kernels for sm_80, 16-bit tokens, with mma.m16n8k16: `expand` (norm, fc1, GELU) writes the
// hidden tensor, `project` (fc2, layer scale, residual, moments) reads it. For any C and hidden that are multiples of
// 8, and with the bits of the fused kernel, whatever the tile: fragments_sm80.h says why.
//
// A thread block makes a tile of one slot or two x some columns. Each of its warps has 32 rows. Both operands come
// through a ring of stages, asynchronously, k upwards and 32 of k at a time; what is beyond the matrices is zero.
// `expand` norms x in registers, after ldmatrix. In a large tile a warp has all columns, so each value is normed once:
// 5 instructions for two values against 128 multiply-adds of the matrix units for each.
//
// Shared memory: the places of the slots, then the stages. A stage is rows [rows, 32] and weights [columns, 32], both
// swizzled. When the sums are complete, a tile [rows, columns] of results takes the place of the stages; `project`
// first loads x into it.
//
// Cost of a tile of 128 x 128: ldmatrix reads 160 bytes per mma, of the 256 that shared memory gives in its time, and
// L2 gives 32 bytes a cycle. The memory traffic is 22 C bytes a row (hidden = 4 C) for 8 C^2 multiply-adds, so on an
// A100 memory is the limit up to C = 280 and the matrix units above.
#pragma once

#include <sstream>
#include <stdexcept>

#include "fragments_sm80.h"
#include "launch.h"
#include "slot_epilogue.h"

namespace riformer::cuda::sm80 {

// Warps: beside each other across the columns. PerMultiprocessor: thread blocks that have to fit on one at a time.
template <int Slots, int Columns, int Warps, int PerMultiprocessor>
struct PairShape {
  static constexpr int kSlots = Slots, kRows = Slots * kSlotRows, kColumns = Columns;
  static constexpr int kPerMultiprocessor = PerMultiprocessor;
  static constexpr int kRowTiles = 2, kWarpRows = 16 * kRowTiles;
  static constexpr int kWarpsAcross = Warps, kWarpColumns = Columns / Warps;
  static constexpr int kWarps = Warps * (kRows / kWarpRows), kThreads = kWarps * kWarp;
  static constexpr int kDepth = 32, kDepthPieces = kDepth / 8, kStages = 3, kPieces = Columns / 8;
  static constexpr int kRowBytes = kRows * kDepth * 2, kStageBytes = kRowBytes + Columns * kDepth * 2;
  static constexpr int kTileBytes = kRows * Columns * 2;
  static constexpr int kSharedBytes =
      kPlaceBytes + (kStages * kStageBytes > kTileBytes ? kStages * kStageBytes : kTileBytes);
  static_assert(kSlots * sizeof(SlotPlace) <= kPlaceBytes, "the places do not fit");
  static_assert(kWarpColumns % 16 == 0, "ldmatrix reads 16 columns");
  static_assert(kSharedBytes <= 99 * 1024, "what a thread block may use on sm_86 and sm_89");
};

// 160 columns divide C = 320, of which tiles of 128 columns would waste a sixth. The small tile is for launches whose
// large tiles would leave multiprocessors without work.
using LargeTile = PairShape<2, 128, 1, 2>;
using WideTile = PairShape<2, 160, 1, 2>;
using SmallTile = PairShape<1, 64, 2, 3>;

// The tile of a thread block, and the part of it that is the calling warp's.
template <class Shape>
struct PairTile {
  const SlotPlace* places;  // in shared memory, one for each slot
  unsigned char* stages;
  int64_t slot;               // the first slot of the tile
  int column;                 // the first column of the tile
  int warp_row, warp_column;  // the first of the warp, counted from the tile's

  RIFORMER_DEVICE explicit PairTile(int64_t columns) {
    const int64_t across = (columns + Shape::kColumns - 1) / Shape::kColumns;
    const int64_t down = thread_block_index() / across;
    const int warp = thread_index() / kWarp;
    slot = down * Shape::kSlots;
    column = static_cast<int>(thread_block_index() - down * across) * Shape::kColumns;
    warp_row = warp / Shape::kWarpsAcross * Shape::kWarpRows;
    warp_column = warp % Shape::kWarpsAcross * Shape::kWarpColumns;
    places = reinterpret_cast<const SlotPlace*>(shared_memory());
    stages = shared_memory() + kPlaceBytes;
  }
};

template <class Shape>
using PairSums = float[Shape::kRowTiles][Shape::kWarpColumns / 8][4];

// sums += rows weights^T, where `rows` is [all rows, depth] and `weights` is [columns, depth]. What the callers do in
// between: `ready()` runs once, when tile.places is filled; `before(k)` runs while a stage is waited for;
// `prepare(k, step, a)` changes the operand of rows for the 16 of k from k + step on.
template <class T, class Shape, RowMode Mode, class Ready, class Before, class Prepare>
RIFORMER_DEVICE void product(const BlockKernelArgs& args, const PairTile<Shape>& tile, const void* rows,
                             const void* weights, int columns, int depth, PairSums<Shape>& sums, const Ready& ready,
                             const Before& before, const Prepare& prepare) {
  static_assert(sizeof(T) == 2, "a piece is eight channels");
  const int lane = thread_index() % kWarp;
  // Find the slots of the tile.
  int64_t first[Shape::kSlots];
  int count[Shape::kSlots];
  RIFORMER_UNROLL
  for (int i = 0; i < Shape::kSlots; ++i) {
    const SlotPlace place = place_of<Mode>(args, tile.slot + i);
    if (thread_index() == 0) const_cast<SlotPlace*>(tile.places)[i] = place;
    first[i] = place.slot.first;
    count[i] = place.slot.rows;
  }
  const auto copy_stage = [&](int stage, int k) {
    unsigned char* const to = tile.stages + stage * Shape::kStageBytes;
    RIFORMER_UNROLL
    for (int i = 0; i < Shape::kSlots; ++i)
      copy_tile<Shape::kDepthPieces, kSlotRows, Shape::kThreads>(
          to + i * kSlotRows * Shape::kDepth * 2, static_cast<const uint16_t*>(rows) + first[i] * depth + k,
          2 * static_cast<int64_t>(depth), count[i], (depth - k) / 8);
    copy_tile<Shape::kDepthPieces, Shape::kColumns, Shape::kThreads>(
        to + Shape::kRowBytes, static_cast<const uint16_t*>(weights) + static_cast<int64_t>(tile.column) * depth + k,
        2 * static_cast<int64_t>(depth), columns - tile.column, (depth - k) / 8);
  };
  // Start the copies of the first stages.
  RIFORMER_UNROLL
  for (int i = 0; i < Shape::kStages - 1; ++i) {
    if (i * Shape::kDepth < depth) copy_stage(i, i * Shape::kDepth);
    copy_async_commit();
  }
  sync_thread_block();
  ready();
  int current = 0;
  RIFORMER_NO_UNROLL
  for (int k = 0; k < depth; k += Shape::kDepth) {
    // Wait for this stage. After the barrier all threads have it, and are done with the stage that is filled next.
    before(k);
    copy_async_wait<Shape::kStages - 2>();
    sync_thread_block();
    // Start the copies of a later stage.
    const int next = k + (Shape::kStages - 1) * Shape::kDepth;
    if (next < depth) copy_stage(current ? current - 1 : Shape::kStages - 1, next);
    copy_async_commit();
    // Multiply by this stage.
    const unsigned char* const stage = tile.stages + current * Shape::kStageBytes;
    const TileReader<Shape::kDepthPieces, LaneOfA> left(stage, lane);
    const TileReader<Shape::kDepthPieces, LaneOfB> right(stage + Shape::kRowBytes, lane);
    RIFORMER_UNROLL
    for (int step = 0; step < Shape::kDepth; step += 16) {
      // The fused kernel adds nothing beyond `depth`; adding zeros could change the sign of a zero.
      if (step && k + step >= depth) break;
      uint32_t a[Shape::kRowTiles][4];
      RIFORMER_UNROLL
      for (int r = 0; r < Shape::kRowTiles; ++r) left.load(a[r], tile.warp_row + 16 * r, step);
      prepare(k, step, a);
      RIFORMER_UNROLL
      for (int n = 0; n < Shape::kWarpColumns / 16; ++n) {
        uint32_t b[4];
        right.load(b, tile.warp_column + 16 * n, step);
        RIFORMER_UNROLL
        for (int r = 0; r < Shape::kRowTiles; ++r) {
          multiply_16x8x16<T>(sums[r][2 * n], a[r], {b[0], b[1]});
          multiply_16x8x16<T>(sums[r][2 * n + 1], a[r], {b[2], b[3]});
        }
      }
    }
    current = current + 1 == Shape::kStages ? 0 : current + 1;
  }
  // From here on the caller may use the stages.
  copy_async_wait<0>();
  sync_thread_block();
}

template <class T, class Shape, RowMode Mode>
RIFORMER_KERNEL(Shape::kThreads, Shape::kPerMultiprocessor)
expand_kernel(RIFORMER_GRID_CONSTANT BlockKernelArgs args) {
  const PairTile<Shape> tile(args.hidden);
  const int lane = thread_index() % kWarp, C = args.channels;
  const SlotPlace& place = tile.places[tile.warp_row / kSlotRows];

  // The sums start as the biases.
  float sums[Shape::kRowTiles][Shape::kWarpColumns / 8][4];
  RIFORMER_UNROLL
  for (int n = 0; n < Shape::kWarpColumns / 8; ++n) {
    const int column = tile.column + tile.warp_column + 8 * n + 2 * (lane % 4);
    const Pair bias = column < args.hidden ? load_pair(args.constants + column) : Pair{{0.f, 0.f}};
    RIFORMER_UNROLL
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      sums[r][n][0] = sums[r][n][2] = bias.value[0];
      sums[r][n][1] = sums[r][n][3] = bias.value[1];
    }
  }

  // The product, of rows that are normed in their fragments. GroupNorm's maps are loaded before the wait for a stage,
  // so that both waits overlap. LayerNorm's maps are twice as many, too many for the registers, and are loaded when
  // needed.
  WarpRows<Shape::kRowTiles, Mode> rows{};
  constexpr bool kAhead = Mode != RowMode::position;
  ChannelMaps<Mode == RowMode::position> maps[Shape::kDepth / 16];
  const auto load_maps = [&](int k, int step) { maps[step / 16].load(rows.maps, k + step + 2 * (lane % 4), C); };
  product<T, Shape, Mode>(
      args, tile, args.x, args.fc1_weight, args.hidden, C, sums,
      [&] { rows.find(args, place, tile.warp_row % kSlotRows, lane); },
      [&](int k) {
        RIFORMER_UNROLL
        for (int step = 0; kAhead && step < Shape::kDepth; step += 16) load_maps(k, step);
      },
      [&](int k, int step, uint32_t (&a)[Shape::kRowTiles][4]) {
        if (!kAhead) load_maps(k, step);
        norm_fragments<T>(a, rows, maps[step / 16], k + step + 2 * (lane % 4), C);
      });

  // GELU, into a tile of shared memory.
  const auto at = [&](int row, int piece) { return tile.stages + SwizzledTile<Shape::kPieces>::offset(row, piece); };
  RIFORMER_UNROLL
  for (int r = 0; r < Shape::kRowTiles; ++r) {
    RIFORMER_UNROLL
    for (int n = 0; n < Shape::kWarpColumns / 8; ++n) {
      RIFORMER_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float* const pair = &sums[r][n][2 * i];
        *reinterpret_cast<uint32_t*>(at(tile.warp_row + 16 * r + 8 * i + lane / 4, tile.warp_column / 8 + n) +
                                     4 * (lane % 4)) = pack<T>(gelu<T>(pair[0]), gelu<T>(pair[1]));
      }
    }
  }
  // From there to the hidden tensor.
  sync_thread_block();
  const int left = (args.hidden - tile.column) / 8, pieces = left < Shape::kPieces ? left : Shape::kPieces;
  for (int i = 0; i < Shape::kSlots; ++i) {
    const Slot slot = tile.places[i].slot;
    store_slot([&](int row, int piece) { return at(i * kSlotRows + row, piece); }, slot.rows, pieces,
               static_cast<uint16_t*>(args.hidden_tensor) + slot.first * args.hidden + tile.column,
               2 * static_cast<int64_t>(args.hidden), thread_index(), Shape::kThreads);
  }
}

template <class T, class Shape, RowMode Mode>
RIFORMER_KERNEL(Shape::kThreads, Shape::kPerMultiprocessor)
project_kernel(RIFORMER_GRID_CONSTANT BlockKernelArgs args) {
  const PairTile<Shape> tile(args.channels);
  const int lane = thread_index() % kWarp, C = args.channels;
  float sums[Shape::kRowTiles][Shape::kWarpColumns / 8][4] = {};
  product<T, Shape, Mode>(
      args, tile, args.hidden_tensor, args.fc2_weight, C, args.hidden, sums, [] {}, [](int) {},
      [](int, int, uint32_t (&)[Shape::kRowTiles][4]) {});

  // Load x, for the residual, into a tile of shared memory.
  const int left = (C - tile.column) / 8, pieces = left < Shape::kPieces ? left : Shape::kPieces;
  RIFORMER_UNROLL
  for (int i = 0; i < Shape::kSlots; ++i) {
    const Slot slot = tile.places[i].slot;
    copy_tile<Shape::kPieces, kSlotRows, Shape::kThreads>(
        tile.stages + i * kSlotRows * 2 * Shape::kColumns,
        static_cast<const uint16_t*>(args.x) + slot.first * C + tile.column, 2 * static_cast<int64_t>(C), slot.rows,
        pieces);
  }
  copy_async_commit();
  WarpRows<Shape::kRowTiles, Mode> rows{};
  rows.find(args, tile.places[tile.warp_row / kSlotRows], tile.warp_row % kSlotRows, lane);
  copy_async_wait<0>();
  sync_thread_block();

  // Finish the rows in the place of x, store them, and take the moments of each slot.
  finish_fragments<T, Shape::kPieces>(args, rows, tile.stages + tile.warp_row * 2 * Shape::kColumns,
                                      tile.warp_column / 8, tile.column + tile.warp_column, sums, lane);
  sync_thread_block();
  for (int i = 0; i < Shape::kSlots; ++i) {
    const Slot slot = tile.places[i].slot;
    if (!slot.rows) continue;
    const auto at = [&](int row, int piece) {
      return tile.stages + SwizzledTile<Shape::kPieces>::offset(i * kSlotRows + row, piece);
    };
    store_slot(at, slot.rows, pieces, static_cast<uint16_t*>(args.out) + slot.first * C + tile.column,
               2 * static_cast<int64_t>(C), thread_index(), Shape::kThreads);
    if (args.partials)
      slot_moments<T>(at, slot.rows, pieces, thread_index() / kWarp, Shape::kWarps,
                      args.partials + (tile.slot + i) * 2 * C + tile.column, C);
  }
}

template <class Shape>
int64_t pair_thread_blocks(const BlockKernelArgs& args, int64_t columns) {
  const int64_t slots = slot_count(args.rows, args.positions, args.slots_per_image);
  return (slots + Shape::kSlots - 1) / Shape::kSlots * ((columns + Shape::kColumns - 1) / Shape::kColumns);
}

template <class Shape>
Launch pair_launch(const char* kernel, const BlockKernelArgs& args, int64_t columns, const Device& device) {
  Launch how{kernel, pair_thread_blocks<Shape>(args, columns), Shape::kThreads, Shape::kSharedBytes};
  how.stream = device.stream;
  return how;
}

// Whether tiles of 160 columns waste fewer columns than tiles of 128.
inline bool wide_tile_serves(int64_t columns) { return (columns + 159) / 160 * 160 < (columns + 127) / 128 * 128; }

// Whether large tiles would leave multiprocessors idle. No result depends on the tile, so it may follow the batch.
inline bool small_tile_serves(const BlockKernelArgs& args, int64_t columns, const Device& device) {
  return pair_thread_blocks<LargeTile>(args, columns) < device.processors;
}

template <class T, class Shape>
void launch_expand(const BlockKernelArgs& args, const Device& device) {
  const Launch how = pair_launch<Shape>("riformer block sm80 expand", args, args.hidden, device);
  with_row_mode(args, [&](auto mode) { launch(expand_kernel<T, Shape, decltype(mode)::value>, how, args); });
}

template <class T, class Shape>
void launch_project(const BlockKernelArgs& args, const Device& device) {
  const Launch how = pair_launch<Shape>("riformer block sm80 project", args, args.channels, device);
  with_row_mode(args, [&](auto mode) { launch(project_kernel<T, Shape, decltype(mode)::value>, how, args); });
}

template <class Shape>
std::string describe_tile() {
  std::ostringstream out;
  out << Shape::kRows << " x " << Shape::kColumns;
  return out.str();
}

inline std::string describe_pair(int64_t channels) {
  const std::string small = " (" + describe_tile<SmallTile>() + " where that leaves multiprocessors idle)";
  return "sm80 expand, " + describe_tile<LargeTile>() + small + ", and project, " +
         (wide_tile_serves(channels) ? describe_tile<WideTile>() : describe_tile<LargeTile>()) + small;
}

template <class T>
void launch_pair(const BlockKernelArgs& args, const Device& device) {
  if (small_tile_serves(args, args.hidden, device))
    launch_expand<T, SmallTile>(args, device);
  else
    launch_expand<T, LargeTile>(args, device);
  if (small_tile_serves(args, args.channels, device))
    launch_project<T, SmallTile>(args, device);
  else if (wide_tile_serves(args.channels))
    launch_project<T, WideTile>(args, device);
  else
    launch_project<T, LargeTile>(args, device);
}

}  // namespace riformer::cuda::sm80
