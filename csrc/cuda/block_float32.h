// The block as a pair of kernels for float32 tokens, with ordinary multiply-adds: `expand` (norm, fc1, GELU) writes the
// hidden tensor, `project` (fc2, layer scale, residual, moments) reads it. For any C and hidden that are multiples of
// 8, and for every architecture.
//
// A thread block makes a tile of one slot (64 rows) x 64 columns. A thread makes 4 rows x 8 columns of it, which are 16
// rows and 8 columns apart. k comes in steps of 32, through two stages of shared memory: while one is multiplied by,
// the next is loaded. Weights are copied asynchronously; rows go through registers, where `expand` norms them. The 32
// products of a step are summed on their own and then added, because one chain over all of k (3072 at the widest) has a
// larger error than PyTorch's sums, which are made of parts too.
//
// Shared memory: two stages of rows [64, 36] and weights [64, 36] in float32. A row has 36 values and not 32, so that
// the same piece of eight rows lies in eight different groups of banks. The results take their place as a tile [64,
// 68].
//
// Cost: a thread reads 12 pieces for 128 multiply-adds, so the multiply-adds are the limit (64 or 128 a cycle), 8 C^2
// of them per row for hidden = 4 C.
#pragma once

#include "block_args.h"
#include "gelu.h"
#include "launch.h"
#include "slot_epilogue.h"

namespace riformer::cuda::float32 {

constexpr int kColumns = 64, kDepth = 32, kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kPitch = kDepth + 4, kOutPitch = kColumns + 4;  // in floats
constexpr int kRowsOfThread = 4, kColumnsOfThread = 8;
constexpr int kStageFloats = (kSlotRows + kColumns) * kPitch;
constexpr int kSharedBytes = 2 * kStageFloats * 4;
constexpr int kPieces = kDepth / 4;                     // in a row of a stage
constexpr int kLoads = kSlotRows * kPieces / kThreads;  // pieces of the rows that a thread loads, and of the weights
static_assert(kSlotRows * kOutPitch * 4 <= kSharedBytes && kColumns == kSlotRows,
              "the results fit into the stages, and rows and weights are loaded in the same way");

struct alignas(16) Four {
  float value[4];
};
RIFORMER_DEVICE Four load_four(const float* from) { return *reinterpret_cast<const Four*>(from); }
RIFORMER_DEVICE void store_four(float* to, const Four& four) { *reinterpret_cast<Four*>(to) = four; }

// The tile of a thread block.
struct Tile {
  int64_t slot;
  Slot rows;
  int column;

  RIFORMER_DEVICE Tile(const BlockKernelArgs& args, int64_t columns) {
    const int64_t across = (columns + kColumns - 1) / kColumns;
    slot = thread_block_index() / across;
    column = static_cast<int>(thread_block_index() - slot * across) * kColumns;
    rows = slot_at(slot, args.rows, args.positions, args.slots_per_image);
  }
};

// The maps of a row's image. With LayerNorm there is one set of maps for all.
RIFORMER_DEVICE const float* maps_of_row(const BlockKernelArgs& args, const Tile& tile, int64_t row) {
  int64_t image = 0;
  if (!args.statistics) image = args.slots_per_image ? tile.slot / args.slots_per_image : row / args.positions;
  return args.maps + image * 5 * args.channels;
}

using Sums = float[kRowsOfThread][kColumnsOfThread];

// sums += rows weights^T. `load(i, row, k)` returns four values of a row of the slot, which is the thread's i-th.
template <class Load>
RIFORMER_DEVICE void product(const Tile& tile, const Load& load, const float* weights, int columns, int depth,
                             Sums& sums) {
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index(), row = thread / kPieces, piece = thread % kPieces;
  constexpr int kStep = kThreads / kPieces;
  Four next[kLoads];
  // Starts to load a stage: the rows into registers, the weights into shared memory.
  const auto fetch = [&](int k, float* stage) {
    RIFORMER_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int r = row + i * kStep, at = k + 4 * piece;
      next[i] = r < tile.rows.rows && at < depth ? load(i, r, at) : Four{{0.f, 0.f, 0.f, 0.f}};
      copy_async_16(stage + (kSlotRows + r) * kPitch + 4 * piece,
                    weights + static_cast<int64_t>(tile.column + r) * depth + at,
                    tile.column + r < columns && at < depth);
    }
    copy_async_commit();
  };
  // Stores the rows.
  const auto put = [&](float* stage) {
    RIFORMER_UNROLL
    for (int i = 0; i < kLoads; ++i) store_four(stage + (row + i * kStep) * kPitch + 4 * piece, next[i]);
  };
  fetch(0, shared);
  put(shared);
  int current = 0;
  RIFORMER_NO_UNROLL
  for (int k = 0; k < depth; k += kDepth) {
    // Wait for this stage, and start to load the next one.
    copy_async_wait<0>();
    sync_thread_block();
    const float* const stage = shared + current * kStageFloats;
    float* const other = shared + (1 - current) * kStageFloats;
    if (k + kDepth < depth) fetch(k + kDepth, other);
    // Multiply by this stage.
    Sums step = {};
    RIFORMER_NO_UNROLL
    for (int at = 0; at < kDepth; at += 4) {
      Four a[kRowsOfThread], b[kColumnsOfThread];
      RIFORMER_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) a[i] = load_four(stage + (thread / 8 + 16 * i) * kPitch + at);
      RIFORMER_UNROLL
      for (int j = 0; j < kColumnsOfThread; ++j)
        b[j] = load_four(stage + (kSlotRows + thread % 8 + 8 * j) * kPitch + at);
      RIFORMER_UNROLL
      for (int e = 0; e < 4; ++e) {
        RIFORMER_UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {
          RIFORMER_UNROLL
          for (int j = 0; j < kColumnsOfThread; ++j)
            step[i][j] = multiply_add(a[i].value[e], b[j].value[e], step[i][j]);
        }
      }
    }
    RIFORMER_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) {
      RIFORMER_UNROLL
      for (int j = 0; j < kColumnsOfThread; ++j) sums[i][j] += step[i][j];
    }
    if (k + kDepth < depth) put(other);
    current = 1 - current;
  }
  // From here on the caller may use the stages.
  sync_thread_block();
}

template <bool PerPosition>
RIFORMER_KERNEL(kThreads, 3)
expand_kernel(RIFORMER_GRID_CONSTANT BlockKernelArgs args) {
  // The statistics and maps of the rows that this thread loads.
  const Tile tile(args, args.hidden);
  const auto* const x = static_cast<const float*>(args.x) + tile.rows.first * args.channels;
  const float* maps[kLoads];
  RowStatistics statistics[kLoads];
  RIFORMER_UNROLL
  for (int i = 0; i < kLoads; ++i) {
    const int r = thread_index() / kPieces + i * (kThreads / kPieces);
    const int64_t row = tile.rows.first + (r < tile.rows.rows ? r : 0);
    maps[i] = maps_of_row(args, tile, row);
    statistics[i] = row_statistics(args, row, maps[i]);
  }
  // The product, of rows that are normed when they are loaded.
  Sums sums = {};
  const auto load = [&](int i, int row, int k) {
    const float* const at = maps[i] + k;
    Four z = load_four(x + static_cast<int64_t>(row) * args.channels + k), u{}, w{};
    if (PerPosition) u = load_four(at), w = load_four(at + args.channels);
    const Four p = load_four(at + 2 * static_cast<int64_t>(args.channels));
    const Four q = load_four(at + 3 * static_cast<int64_t>(args.channels));
    RIFORMER_UNROLL
    for (int e = 0; e < 4; ++e)
      z.value[e] = normed<PerPosition>(z.value[e], statistics[i], u.value[e], w.value[e], p.value[e], q.value[e]);
    return z;
  };
  product(tile, load, static_cast<const float*>(args.fc1_weight), args.hidden, args.channels, sums);

  // GELU, into a tile of shared memory, and from there to the hidden tensor.
  auto* const out = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index();
  RIFORMER_UNROLL
  for (int j = 0; j < kColumnsOfThread; ++j) {
    const int column = thread % 8 + 8 * j;
    const float bias = tile.column + column < args.hidden ? args.constants[tile.column + column] : 0.f;
    RIFORMER_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i)
      out[(thread / 8 + 16 * i) * kOutPitch + column] = gelu<float>(sums[i][j] + bias);
  }
  sync_thread_block();
  const int left = args.hidden - tile.column;
  store_slot([&](int row, int piece) { return out + row * kOutPitch + 4 * piece; }, tile.rows.rows,
             (left < kColumns ? left : kColumns) / 4,
             static_cast<float*>(args.hidden_tensor) + tile.rows.first * args.hidden + tile.column,
             4 * static_cast<int64_t>(args.hidden), thread, kThreads);
}

RIFORMER_KERNEL(kThreads, 3) project_kernel(RIFORMER_GRID_CONSTANT BlockKernelArgs args) {
  const Tile tile(args, args.channels);
  const int C = args.channels, thread = thread_index();
  const auto* const hidden_tensor = static_cast<const float*>(args.hidden_tensor) + tile.rows.first * args.hidden;
  Sums sums = {};
  const auto load = [&](int, int row, int k) {
    return load_four(hidden_tensor + static_cast<int64_t>(row) * args.hidden + k);
  };
  product(tile, load, static_cast<const float*>(args.fc2_weight), C, args.hidden, sums);

  // Finish the rows, into a tile of shared memory.
  auto* const out = reinterpret_cast<float*>(shared_memory());
  const auto* const x = static_cast<const float*>(args.x) + tile.rows.first * C + tile.column;
  const float* const scales = args.constants + args.hidden + tile.column;
  RIFORMER_UNROLL
  for (int i = 0; i < kRowsOfThread; ++i) {
    const int row = thread / 8 + 16 * i;
    if (row >= tile.rows.rows) break;
    const float* const maps = maps_of_row(args, tile, tile.rows.first + row);
    const RowStatistics statistics = row_statistics(args, tile.rows.first + row, maps);
    RIFORMER_UNROLL
    for (int j = 0; j < kColumnsOfThread; ++j) {
      const int column = thread % 8 + 8 * j;
      if (tile.column + column >= C) break;
      out[row * kOutPitch + column] =
          finished(x[static_cast<int64_t>(row) * C + column], statistics, maps[tile.column + column],
                   maps[C + tile.column + column], sums[i][j], scales[column], scales[C + column], args.residual);
    }
  }
  // Store them, and take the moments of the slot.
  sync_thread_block();
  const auto at = [&](int row, int piece) { return out + row * kOutPitch + 4 * piece; };
  const int left = C - tile.column, pieces = (left < kColumns ? left : kColumns) / 4;
  store_slot(at, tile.rows.rows, pieces, static_cast<float*>(args.out) + tile.rows.first * C + tile.column,
             4 * static_cast<int64_t>(C), thread, kThreads);
  if (args.partials)
    slot_moments<float>(at, tile.rows.rows, pieces, thread / kWarp, kWarps,
                        args.partials + tile.slot * 2 * C + tile.column, C);
}

}  // namespace riformer::cuda::float32
