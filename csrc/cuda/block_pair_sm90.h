// The block as a pair of kernels for Hopper, with the hidden tensor in memory. For C >= 512, where the sums of the
// fused kernel exceed the registers, and for few rows, where whole slots would leave most multiprocessors idle.
//
//     expand:  hidden_tensor = gelu(z W1^T + b1)         z in shared memory, computed before the products
//     project: out = y + ls2 (hidden_tensor W2^T + b2)   and the moments of each slot
//
// One producer thread copies panels of 64 k into a ring; each consumer warpgroup has a slot of 64 rows. Every sum is
// one chain over k upwards in steps of 16, as in block_fused_sm90.h. So both forms and all widths give the same bits,
// and the choice among them may depend on the batch.
//
// Shared memory of expand: barriers [1 KiB], z [Consumers][64 x C], the ring [stages][Width x 64].
// Shared memory of project: barriers [1 KiB], tiles for the results [Consumers][64 x Width], the ring
// [stages][(Consumers * 64 + Width) x 64].
// Cost for N rows: expand writes 8 N C bytes of the hidden tensor and project reads them. At C = 512 that is 16 bytes
// for 2048 multiply-adds, far below what the L2 gives.
#pragma once

#include "slot_sm90.h"

namespace riformer::cuda {

// k of a panel: 128 bytes, the widest swizzle.
constexpr int kPanelRowBytes = 128;
template <class T>
constexpr int kPanelDepth = kPanelRowBytes / kElementBytes<T>;

struct PairArgs {
  BlockKernelArgs block;
  TensorMap tokens;         // x [rows, C]
  TensorMap hidden_tensor;  // [rows, hidden]; only for project
  TensorMap weight;         // [columns of the result, k]
  int slots;
  int column_tiles;  // tiles of Width columns that one thread block computes; project: 1
  int stages;
};

template <class T, int Consumers, int Width>
struct ExpandConfig {
  static constexpr int kThreads = kWarpgroup * (Consumers + 1);
  static constexpr int kPanelBytes = Width * kPanelRowBytes;
  static constexpr int64_t fixed_bytes(int64_t channels) {
    return kBarrierBytes + int64_t{kElementBytes<T>} * Consumers * kSlotRows * channels;
  }
};

template <class T, int Consumers, int Width>
struct ProjectConfig {
  static constexpr int kThreads = kWarpgroup * (Consumers + 1);
  static constexpr int kStrip = strip_width<T>(Width);
  static constexpr int kRowsBytes = kSlotRows * kPanelRowBytes;  // of one consumer
  static constexpr int kPanelBytes = Consumers * kRowsBytes + Width * kPanelRowBytes;
  static constexpr int kTileBytes = kElementBytes<T> * kSlotRows * Width;
  static constexpr int64_t kFixedBytes = kBarrierBytes + Consumers * kTileBytes;
};

// The descriptors of both operands of a product: a panel of rows and a panel of the weight.
struct Operands {
  uint64_t rows, weight;
};

// sums = rows weight^T, panel after panel. `operands(panel, stage)` gives the descriptors of a panel, which is in stage
// `stage` of the ring.
template <class T, int Width, class Find>
RIFORMER_DEVICE void multiply_panels(float (&sums)[Width / 2], const Ring& ring, RingPlace& place, int panels,
                                     const Find& operands) {
  int held = 0;
  RIFORMER_NO_UNROLL
  for (int panel = 0; panel < panels; ++panel) {
    // Wait for the panel.
    const int stage = place.stage;
    barrier_wait(ring.full + stage, place.parity);
    place.next(ring.stages);

    // Start its product.
    const Operands of = operands(panel, stage);
    product_fence();
    RIFORMER_UNROLL
    for (int k = 0; k < kPanelDepth<T> / kProductDepth<T>; ++k)
      product<T, Width>(sums, advanced(of.rows, kProductBytes * k), advanced(of.weight, kProductBytes * k),
                        panel > 0 || k > 0);
    product_commit();

    // Wait for the product of the panel before, while this one's is under way.
    if (panel > 0) {
      product_wait<1>();
      release(ring, held);
    }
    held = stage;
  }
  product_wait<0>();
  keep_after_wait(sums);
  release(ring, held);
}

// Exchanges words among four neighbouring threads. Before, each of them has two columns (a word) of four groups of
// eight columns; after, each has all eight columns of one group, which is a piece that is stored as one.
RIFORMER_DEVICE Vec16 gather_quad(const uint32_t (&word)[4], int lane) {
  Vec16 out;
  RIFORMER_UNROLL
  for (int i = 0; i < 4; ++i) out.word[i] = word[i];
  RIFORMER_UNROLL
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
    RIFORMER_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      // Selected and not indexed: an index known only at run time would put the words into local memory.
      const uint32_t low = out.word[i], high = out.word[i | bit];
      const uint32_t swap = shuffle_xor(static_cast<int>(upper ? low : high), bit);
      out.word[i] = upper ? swap : low;
      out.word[i | bit] = upper ? high : swap;
    }
  }
  return out;
}

// Stores gelu(sums + b1) of a slot in the hidden tensor, Width columns from `column` on.
template <class T, int Width>
RIFORMER_DEVICE void store_hidden(const BlockKernelArgs& args, const Slot& slot, const float (&sums)[Width / 2],
                                  int column, int t) {
  static_assert(sizeof(T) == 2, "a word is two columns");
  const float* bias = args.constants + column + 2 * (t % 4);
  T* hidden_tensor = static_cast<T*>(args.hidden_tensor) + slot.first * args.hidden + column + t % 4 * 8;
  RIFORMER_UNROLL
  for (int j = 0; j < Width / 8; j += 4) {
    uint32_t word[2][4];
    RIFORMER_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Pair b = load_pair(bias + 8 * (j + i));
      RIFORMER_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float* h = sums + 4 * (j + i) + 2 * half;
        word[half][i] = pack<T>(gelu<T>(h[0] + b.value[0]), gelu<T>(h[1] + b.value[1]));
      }
    }
    RIFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = t / kWarp * 16 + t % kWarp / 4 + 8 * half;
      const Vec16 together = gather_quad(word[half], t);
      if (r < slot.rows) store_16(hidden_tensor + static_cast<int64_t>(r) * args.hidden + 8 * j, together);
    }
  }
}

template <class T, int Consumers, int Width>
RIFORMER_KERNEL((ExpandConfig<T, Consumers, Width>::kThreads), 1)
expand_sm90(RIFORMER_GRID_CONSTANT PairArgs args) {
  using Config = ExpandConfig<T, Consumers, Width>;
  using Tile = SlotTile<T, kPanelDepth<T>>;  // a strip of the tile is a panel of k
  const int C = args.block.channels, panels = C / kPanelDepth<T>;
  const int fixed_bytes = static_cast<int>(Config::fixed_bytes(C));
  const Ring ring = ring_at(fixed_bytes, args.stages, Config::kPanelBytes);
  if (thread_index() == 0) ring_init(ring, Consumers * (kWarpgroup / kWarp), Consumers);
  sync_thread_block();
  // `group`: of Consumers slots. The thread blocks of a group divide the columns among them.
  const int splits = args.block.hidden / Width / args.column_tiles;
  const int group = static_cast<int>(thread_block_index()) / splits;
  const int first_column = static_cast<int>(thread_block_index()) % splits * args.column_tiles * Width;
  const int warpgroup = thread_index() / kWarpgroup, t = thread_index() % kWarpgroup;
  RingPlace place;

  // The producer: copies the panels of fc1, tile after tile.
  if (warpgroup == Consumers) {
    if (t != 0) return;
    for (int tile = 0; tile < args.column_tiles; ++tile)
      for (int panel = 0; panel < panels; ++panel) {
        barrier_wait(ring.empty + place.stage, place.parity ^ 1);
        barrier_arrive_expect(ring.full + place.stage, Config::kPanelBytes);
        copy_box(ring.panel(place.stage), &args.weight, ring.full + place.stage, panel * kPanelDepth<T>,
                 first_column + tile * Width);
        place.next(ring.stages);
      }
    return;
  }

  // A consumer: loads x and norms it in place.
  const int index = group * Consumers + warpgroup;
  const Slot slot = slot_at_32(args.block, args.slots, index);
  unsigned char* z = shared_memory() + kBarrierBytes + kElementBytes<T> * warpgroup * kSlotRows * C;
  uint64_t* arrived = ring.arrived(warpgroup);
  if (t == 0) copy_slot<T, kPanelDepth<T>>(&args.tokens, slot, 0, C, z, arrived);
  barrier_wait(arrived, 0);
  norm_slot<T, kPanelDepth<T>>(args.block, C, slot, z, t);
  fence_async();
  sync_named(1 + warpgroup, kWarpgroup);

  // One product and GELU for each tile of columns.
  const uint64_t a = descriptor<Tile::kRowBytes>(z);
  RIFORMER_NO_UNROLL
  for (int tile = 0; tile < args.column_tiles; ++tile) {
    float sums[Width / 2];
    multiply_panels<T, Width>(sums, ring, place, panels, [&](int panel, int stage) {
      return Operands{advanced(a, panel * Tile::kStripBytes), descriptor<kPanelRowBytes>(ring.panel(stage))};
    });
    store_hidden<T, Width>(args.block, slot, sums, first_column + tile * Width, t);
  }
}

template <class T, int Consumers, int Width>
RIFORMER_KERNEL((ProjectConfig<T, Consumers, Width>::kThreads), 1)
project_sm90(RIFORMER_GRID_CONSTANT PairArgs args) {
  using Config = ProjectConfig<T, Consumers, Width>;
  constexpr int kStrip = Config::kStrip;
  const int panels = args.block.hidden / kPanelDepth<T>;
  const Ring ring = ring_at(Config::kFixedBytes, args.stages, Config::kPanelBytes);
  if (thread_index() == 0) ring_init(ring, Consumers * (kWarpgroup / kWarp), Consumers);
  sync_thread_block();
  const int tiles = args.block.channels / Width;
  const int group = static_cast<int>(thread_block_index()) / tiles;
  const int column = static_cast<int>(thread_block_index()) % tiles * Width;
  const int warpgroup = thread_index() / kWarpgroup, t = thread_index() % kWarpgroup;
  RingPlace place;

  // The producer: a panel is the rows of every consumer and the rows of fc2, over the same k.
  if (warpgroup == Consumers) {
    if (t != 0) return;
    for (int panel = 0; panel < panels; ++panel) {
      unsigned char* to = ring.panel(place.stage);
      barrier_wait(ring.empty + place.stage, place.parity ^ 1);
      barrier_arrive_expect(ring.full + place.stage, Config::kPanelBytes);
      for (int i = 0; i < Consumers; ++i) {
        // The copy for a slot behind the last takes the rows of the last, because the barrier expects its bytes.
        const int index = group * Consumers + i;
        const Slot slot = slot_at_32(args.block, args.slots, index < args.slots ? index : args.slots - 1);
        copy_box(to + i * Config::kRowsBytes, &args.hidden_tensor, ring.full + place.stage, panel * kPanelDepth<T>,
                 static_cast<int>(slot.first));
      }
      copy_box(to + Consumers * Config::kRowsBytes, &args.weight, ring.full + place.stage, panel * kPanelDepth<T>,
               column);
      place.next(ring.stages);
    }
    return;
  }

  // A consumer: starts the copy of its columns of x, for the residual, and multiplies meanwhile.
  const int index = group * Consumers + warpgroup;
  const Slot slot = slot_at_32(args.block, args.slots, index);
  unsigned char* tile = shared_memory() + kBarrierBytes + warpgroup * Config::kTileBytes;
  uint64_t* arrived = ring.arrived(warpgroup);
  if (t == 0) copy_slot<T, kStrip>(&args.tokens, slot, column, Width, tile, arrived);
  float sums[Width / 2];
  multiply_panels<T, Width>(sums, ring, place, panels, [&](int, int stage) {
    const unsigned char* from = ring.panel(stage);
    return Operands{descriptor<kPanelRowBytes>(from + warpgroup * Config::kRowsBytes),
                    descriptor<kPanelRowBytes>(from + Consumers * Config::kRowsBytes)};
  });

  // Finish the slot in the place of x.
  barrier_wait(arrived, 0);
  finish_columns<T, kStrip, Width>(args.block, args.block.channels, slot, sums, column, 0, tile, t);
  sync_named(1 + warpgroup, kWarpgroup);
  store_slot_and_moments<T, kStrip>(args.block, args.block.channels, index, column, Width, slot, tile, t);
}

}  // namespace riformer::cuda
