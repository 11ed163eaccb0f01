// One block in two kernels, 16-bit tokens: `expand` (norm, fc1, GELU) into the hidden tensor, `project` (fc2, layer
// scale, residual, moments) from it, with mma.m16n8k16. For any C and hidden that are multiples of 8, and with the
// same bits as the fused kernel, whatever the tile: fragments_sm80.h says why.
//
// A thread block makes a tile of rows (one slot or two) x columns; its warps divide it into pieces of 32 rows. Both
// operands come k upwards through a ring of stages, asynchronously, 32 of k at a time; what is beyond the matrices is
// zero. `expand` norms x in its fragments, after ldmatrix: the warps of a large tile have all of its columns, so each
// value is normed once in a tile, 5 instructions for two against 128 multiply-adds of the matrix units for each.
//
// Shared memory: where the slots are; the stages, each rows [rows, 32] and weights [columns, 32], both swizzled. When
// the sums are complete their tile [rows, columns] lies over the stages: `project` first loads x into it.
//
// Cost of a tile of 128 x 128: ldmatrix reads 160 bytes per mma, of the 256 that shared memory gives in its time; L2
// has to give 32 bytes a cycle. In memory the hidden tensor is written and read: for hidden = 4 C, 16 C bytes a row
// beside the 6 C of x (twice) and out, for 8 C^2 multiply-adds. At 1024 of these a cycle that is 2816 / C bytes a
// cycle, and an A100 has about 10: memory bounds it up to C = 280, the matrix units above.
#pragma once

#include <sstream>
#include <stdexcept>

#include "fragments_sm80.h"
#include "launch.h"
#include "launch_sm80.h"
#include "slot_epilogue.h"

namespace riformer::cuda::sm80 {

// Warps: across the columns. Each has 32 rows.
template <int Slots, int Columns, int Warps, int Blocks>
struct ProductShape {
  static constexpr int kSlots = Slots, kRows = Slots * kSlotRows, kColumns = Columns, kBlocks = Blocks;
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
  static_assert(kSharedBytes <= 99 * 1024, "what a block may use on sm_86 and sm_89");
};

// 128 x 160 divides C = 320, which 128 columns would fill to five sixths. The small tile is for launches that leave
// multiprocessors without work otherwise.
using LargeTile = ProductShape<2, 128, 1, 2>;
using WideTile = ProductShape<2, 160, 1, 2>;
using SmallTile = ProductShape<1, 64, 2, 3>;

// What a thread block works on.
template <class Shape>
struct ProductTile {
  const SlotPlace* places;
  unsigned char* stages;
  int64_t slot;  // the first
  int column;    // the first of all
  int warp_row, warp_column;

  RIFORMER_DEVICE explicit ProductTile(int64_t columns) {
    const int64_t across = (columns + Shape::kColumns - 1) / Shape::kColumns;
    const int64_t down = block_index() / across;
    const int warp = thread_index() / kWarp;
    slot = down * Shape::kSlots;
    column = static_cast<int>(block_index() - down * across) * Shape::kColumns;
    warp_row = warp / Shape::kWarpsAcross * Shape::kWarpRows;
    warp_column = warp % Shape::kWarpsAcross * Shape::kWarpColumns;
    places = reinterpret_cast<const SlotPlace*>(shared_memory());
    stages = shared_memory() + kPlaceBytes;
  }
};

template <class Shape>
using ProductSums = float[Shape::kRowTiles][Shape::kWarpColumns / 8][4];

// sums += rows weights^T. `rows` [all rows, depth], `weights` [columns, depth]. `ready` runs once the places of the
// slots are known, `before(k)` before each stage arrives, `prepare(k, a)` on each operand of 16 of k.
template <class T, class Shape, RowMode Mode, class Ready, class Before, class Prepare>
RIFORMER_DEVICE void product(const BlockKernelArgs& args, const ProductTile<Shape>& tile, const void* rows,
                             const void* weights, int columns, int depth, ProductSums<Shape>& sums, const Ready& ready,
                             const Before& before, const Prepare& prepare) {
  const int lane = thread_index() % kWarp;
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
  RIFORMER_UNROLL
  for (int i = 0; i < Shape::kStages - 1; ++i) {
    if (i * Shape::kDepth < depth) copy_stage(i, i * Shape::kDepth);
    copy_async_commit();
  }
  sync_block();
  ready();
  int current = 0;
  RIFORMER_NO_UNROLL
  for (int k = 0; k < depth; k += Shape::kDepth) {
    before(k);
    copy_async_wait<Shape::kStages - 2>();
    sync_block();  // everyone has this stage, and is done with the one that is filled next
    const int next = k + (Shape::kStages - 1) * Shape::kDepth;
    if (next < depth) copy_stage(current ? current - 1 : Shape::kStages - 1, next);
    copy_async_commit();
    const unsigned char* const stage = tile.stages + current * Shape::kStageBytes;
    const TileReader<Shape::kDepthPieces, LaneOfA> left(stage, lane);
    const TileReader<Shape::kDepthPieces, LaneOfB> right(stage + Shape::kRowBytes, lane);
    RIFORMER_UNROLL
    for (int step = 0; step < Shape::kDepth; step += 16) {
      if (step && k + step >= depth) break;  // not even zeros are added where the fused kernel adds none
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
  copy_async_wait<0>();
  sync_block();  // the stages are free
}

template <class T, class Shape, RowMode Mode>
RIFORMER_KERNEL(Shape::kThreads, Shape::kBlocks)
expand_kernel(RIFORMER_GRID_CONSTANT BlockKernelArgs args) {
  const ProductTile<Shape> tile(args.hidden);
  const int lane = thread_index() % kWarp, C = args.channels;
  const SlotPlace& place = tile.places[tile.warp_row / kSlotRows];
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
  WarpRows<Shape::kRowTiles, Mode> rows{};
  // GroupNorm's maps are loaded before the wait for the stage, which then hides this wait too; LayerNorm's are twice
  // as many, too many registers to hold that long.
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
  sync_block();
  const int left = (args.hidden - tile.column) / 8, pieces = left < Shape::kPieces ? left : Shape::kPieces;
  for (int i = 0; i < Shape::kSlots; ++i) {
    const Slot slot = tile.places[i].slot;
    store_slot([&](int row, int piece) { return at(i * kSlotRows + row, piece); }, slot.rows, pieces,
               static_cast<uint16_t*>(args.between) + slot.first * args.hidden + tile.column,
               2 * static_cast<int64_t>(args.hidden), thread_index(), Shape::kThreads);
  }
}

template <class T, class Shape, RowMode Mode>
RIFORMER_KERNEL(Shape::kThreads, Shape::kBlocks)
project_kernel(RIFORMER_GRID_CONSTANT BlockKernelArgs args) {
  const ProductTile<Shape> tile(args.channels);
  const int lane = thread_index() % kWarp, C = args.channels;
  float sums[Shape::kRowTiles][Shape::kWarpColumns / 8][4] = {};
  product<T, Shape, Mode>(
      args, tile, args.between, args.fc2_weight, C, args.hidden, sums, [] {}, [](int) {},
      [](int, int, uint32_t (&)[Shape::kRowTiles][4]) {});

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
  sync_block();
  finish_fragments<T, Shape::kPieces>(args, rows, tile.stages + tile.warp_row * 2 * Shape::kColumns,
                                      tile.warp_column / 8, tile.column + tile.warp_column, sums, lane);
  sync_block();
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
int64_t product_blocks(const BlockKernelArgs& args, int64_t columns) {
  const int64_t slots = slot_count(args.rows, args.positions, args.slots_per_image);
  return (slots + Shape::kSlots - 1) / Shape::kSlots * ((columns + Shape::kColumns - 1) / Shape::kColumns);
}

template <class Shape>
Launch product_launch(const char* kernel, const BlockKernelArgs& args, int64_t columns, const Device& device) {
  Launch how{kernel, product_blocks<Shape>(args, columns), Shape::kThreads, Shape::kSharedBytes};
  how.stream = device.stream;
  return how;
}

// Whether tiles of 160 columns leave less unused than tiles of 128.
inline bool wide_serves(int64_t columns) { return (columns + 159) / 160 * 160 < (columns + 127) / 128 * 128; }

// Which tile follows the size of the launch: no result depends on it.
inline bool small_serves(const BlockKernelArgs& args, int64_t columns, const Device& device) {
  return product_blocks<LargeTile>(args, columns) < device.processors;
}

template <class T, class Shape>
void launch_expand(const BlockKernelArgs& args, const Device& device) {
  const Launch how = product_launch<Shape>("riformer block sm80 expand", args, args.hidden, device);
  with_row_mode(args, [&](auto mode) { launch(expand_kernel<T, Shape, decltype(mode)::value>, how, args); });
}

template <class T, class Shape>
void launch_project(const BlockKernelArgs& args, const Device& device) {
  const Launch how = product_launch<Shape>("riformer block sm80 project", args, args.channels, device);
  with_row_mode(args, [&](auto mode) { launch(project_kernel<T, Shape, decltype(mode)::value>, how, args); });
}

template <class Shape>
std::string describe_product() {
  std::ostringstream out;
  out << Shape::kRows << " x " << Shape::kColumns;
  return out.str();
}

}  // namespace riformer::cuda::sm80

namespace riformer::cuda {

template <class T>
void launch_two_kernels_sm80(const BlockKernelArgs& args, const Device& device) {
  using namespace sm80;
  if (small_serves(args, args.hidden, device))
    launch_expand<T, SmallTile>(args, device);
  else
    launch_expand<T, LargeTile>(args, device);
  if (small_serves(args, args.channels, device))
    launch_project<T, SmallTile>(args, device);
  else if (wide_serves(args.channels))
    launch_project<T, WideTile>(args, device);
  else
    launch_project<T, LargeTile>(args, device);
}

}  // namespace riformer::cuda
