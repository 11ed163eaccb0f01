// The block as two kernels for Hopper, with the hidden tensor in memory: for C >= 512, whose sums exceed the registers,
// and for few rows, where whole slots would leave most multiprocessors idle.
//
//     expand:  between = gelu(z W1^T + b1)             z in shared memory for all of C, computed in the prologue
//     project: out = y + ls2 (between W2^T + b2)       and the moments of each slot
//
// One producer warp copies panels of 64 k into a ring, consumer warpgroups have a slot of 64 rows each. Every element
// is one chain of sums over k upwards in steps of 16, as in block_sm90.h, so the two forms give the same bits, and so
// does every width: which form runs may depend on the batch.
//
// Shared memory of expand: barriers [1 KiB], z [kConsumers][64 x C], the ring [stages][Width x 64]; of project:
// barriers, tiles for the epilogue [kConsumers][64 x Width], the ring [stages][(kConsumers * 64 + Width) x 64]. Cost
// per block of N rows: expand reads its rows once for each of `splits` and writes 8 N C bytes, project reads them; at
// C = 512 that is 16 bytes for 2048 multiply-adds, far below the L2's rate.
#pragma once

#include "slot_sm90.h"

namespace riformer::cuda {

constexpr int kPanelDepth = 64;  // k of a panel: 128 bytes, the widest swizzle

struct ProductArgs {
  BlockKernelArgs block;
  TensorMap tokens;  // x [rows, C]
  TensorMap rows;    // project: between
  TensorMap weight;  // [out columns, k]
  int slots;
  int column_tiles;  // of one thread block, expand: Width wide each
  int stages;
};

template <int Consumers, int Width>
struct ExpandConfig {
  static constexpr int kThreads = kWarpgroup * (Consumers + 1);
  static constexpr int kPanelBytes = 2 * Width * kPanelDepth;
  static constexpr int64_t fixed_bytes(int64_t channels) {
    return kBarrierBytes + int64_t{2} * Consumers * kSlotRows * channels;
  }
};

template <int Consumers, int Width>
struct ProjectConfig {
  static constexpr int kThreads = kWarpgroup * (Consumers + 1);
  static constexpr int kBlock = block_of(Width);
  static constexpr int kRowsBytes = 2 * kSlotRows * kPanelDepth;  // of one consumer
  static constexpr int kPanelBytes = Consumers * kRowsBytes + 2 * Width * kPanelDepth;
  static constexpr int kTileBytes = 2 * kSlotRows * Width;
  static constexpr int64_t kFixedBytes = kBarrierBytes + Consumers * kTileBytes;
};

// The descriptors of a panel of rows and of a panel of the weight.
struct Operands {
  uint64_t rows, weight;
};

// sums = the rows times the weight, panel after panel; `operands(panel, stage)` says where a panel is.
template <class T, int Width, class Find>
RIFORMER_DEVICE void multiply_panels(float (&sums)[Width / 2], const Ring& ring, RingPlace& place, int panels,
                                     const Find& operands) {
  int held = 0;
  RIFORMER_NO_UNROLL
  for (int panel = 0; panel < panels; ++panel) {
    const int stage = place.stage;
    barrier_wait(ring.full + stage, place.parity);
    place.next(ring.stages);
    const Operands of = operands(panel, stage);
    product_fence();
    RIFORMER_UNROLL
    for (int k = 0; k < kPanelDepth / 16; ++k)
      product<T, Width>(sums, advanced(of.rows, 32 * k), advanced(of.weight, 32 * k), panel > 0 || k > 0);
    product_commit();
    // This panel's product runs on while the one before is waited for.
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

// Words of a row, of four groups of eight columns: from one group's two columns in each of four neighbouring threads to
// eight columns of one group in each, which are stored as one.
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
      // Selected, not addressed: an address would put the words into local memory.
      const uint32_t low = out.word[i], high = out.word[i | bit];
      const uint32_t swap = shuffle_xor(static_cast<int>(upper ? low : high), bit);
      out.word[i] = upper ? swap : low;
      out.word[i | bit] = upper ? high : swap;
    }
  }
  return out;
}

// gelu(sums + b1) of a slot to `between`, Width columns from `column` on.
template <class T, int Width>
RIFORMER_DEVICE void store_hidden(const BlockKernelArgs& args, const Slot& slot, const float (&sums)[Width / 2],
                                  int column, int t) {
  const float* bias = args.constants + column + 2 * (t % 4);
  T* between = static_cast<T*>(args.between) + slot.first * args.hidden + column + t % 4 * 8;
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
      if (r < slot.rows) store_16(between + static_cast<int64_t>(r) * args.hidden + 8 * j, together);
    }
  }
}

template <class T, int Consumers, int Width>
RIFORMER_KERNEL((ExpandConfig<Consumers, Width>::kThreads), 1)
expand_sm90(RIFORMER_GRID_CONSTANT ProductArgs args) {
  using Config = ExpandConfig<Consumers, Width>;
  using Tile = SlotTile<64>;
  const int C = args.block.channels, panels = C / kPanelDepth;
  const int fixed_bytes = static_cast<int>(Config::fixed_bytes(C));
  const Ring ring = ring_at(fixed_bytes, args.stages, Config::kPanelBytes);
  if (thread_index() == 0) ring_init(ring, Consumers * (kWarpgroup / kWarp), Consumers);
  sync_block();
  const int splits = args.block.hidden / Width / args.column_tiles;
  const int group = static_cast<int>(block_index()) / splits;
  const int first_column = static_cast<int>(block_index()) % splits * args.column_tiles * Width;
  const int warpgroup = thread_index() / kWarpgroup, t = thread_index() % kWarpgroup;
  RingPlace place;
  if (warpgroup == Consumers) {
    if (t != 0) return;
    for (int tile = 0; tile < args.column_tiles; ++tile)
      for (int panel = 0; panel < panels; ++panel) {
        barrier_wait(ring.empty + place.stage, place.parity ^ 1);
        barrier_arrive_expect(ring.full + place.stage, Config::kPanelBytes);
        copy_box(ring.panel(place.stage), &args.weight, ring.full + place.stage, panel * kPanelDepth,
                 first_column + tile * Width);
        place.next(ring.stages);
      }
    return;
  }
  const int index = group * Consumers + warpgroup;
  const Slot slot = slot_of(args.block, args.slots, index);
  unsigned char* z = shared_memory() + kBarrierBytes + 2 * warpgroup * kSlotRows * C;
  uint64_t* arrived = ring.arrived(warpgroup);
  if (t == 0) copy_slot<64>(&args.tokens, slot, 0, C, z, arrived);
  barrier_wait(arrived, 0);
  norm_slot<T, 64>(args.block, C, slot, z, t);
  fence_async();
  sync_named(1 + warpgroup, kWarpgroup);
  const uint64_t a = descriptor<Tile::kRowBytes>(z);
  RIFORMER_NO_UNROLL
  for (int tile = 0; tile < args.column_tiles; ++tile) {
    float sums[Width / 2];
    multiply_panels<T, Width>(sums, ring, place, panels, [&](int panel, int stage) {
      return Operands{advanced(a, panel * Tile::kPieceBytes), descriptor<128>(ring.panel(stage))};
    });
    store_hidden<T, Width>(args.block, slot, sums, first_column + tile * Width, t);
  }
}

template <class T, int Consumers, int Width>
RIFORMER_KERNEL((ProjectConfig<Consumers, Width>::kThreads), 1)
project_sm90(RIFORMER_GRID_CONSTANT ProductArgs args) {
  using Config = ProjectConfig<Consumers, Width>;
  constexpr int kBlock = Config::kBlock;
  const int panels = args.block.hidden / kPanelDepth;
  const Ring ring = ring_at(Config::kFixedBytes, args.stages, Config::kPanelBytes);
  if (thread_index() == 0) ring_init(ring, Consumers * (kWarpgroup / kWarp), Consumers);
  sync_block();
  const int tiles = args.block.channels / Width;
  const int group = static_cast<int>(block_index()) / tiles;
  const int column = static_cast<int>(block_index()) % tiles * Width;
  const int warpgroup = thread_index() / kWarpgroup, t = thread_index() % kWarpgroup;
  RingPlace place;
  if (warpgroup == Consumers) {
    if (t != 0) return;
    for (int panel = 0; panel < panels; ++panel) {
      unsigned char* to = ring.panel(place.stage);
      barrier_wait(ring.empty + place.stage, place.parity ^ 1);
      barrier_arrive_expect(ring.full + place.stage, Config::kPanelBytes);
      for (int i = 0; i < Consumers; ++i) {
        // A slot that does not exist takes the rows of the last one, as every copy has to arrive.
        const int index = group * Consumers + i;
        const Slot slot = slot_of(args.block, args.slots, index < args.slots ? index : args.slots - 1);
        copy_box(to + i * Config::kRowsBytes, &args.rows, ring.full + place.stage, panel * kPanelDepth,
                 static_cast<int>(slot.first));
      }
      copy_box(to + Consumers * Config::kRowsBytes, &args.weight, ring.full + place.stage, panel * kPanelDepth, column);
      place.next(ring.stages);
    }
    return;
  }
  const int index = group * Consumers + warpgroup;
  const Slot slot = slot_of(args.block, args.slots, index);
  unsigned char* tile = shared_memory() + kBarrierBytes + warpgroup * Config::kTileBytes;
  uint64_t* arrived = ring.arrived(warpgroup);
  if (t == 0) copy_slot<kBlock>(&args.tokens, slot, column, Width, tile, arrived);
  float sums[Width / 2];
  multiply_panels<T, Width>(sums, ring, place, panels, [&](int, int stage) {
    const unsigned char* from = ring.panel(stage);
    return Operands{descriptor<128>(from + warpgroup * Config::kRowsBytes),
                    descriptor<128>(from + Consumers * Config::kRowsBytes)};
  });
  barrier_wait(arrived, 0);
  finish_columns<T, kBlock, Width>(args.block, args.block.channels, slot, sums, column, 0, tile, t);
  sync_named(1 + warpgroup, kWarpgroup);
  leave_slot<T, kBlock>(args.block, args.block.channels, index, column, Width, slot, tile, t);
}

}  // namespace riformer::cuda
