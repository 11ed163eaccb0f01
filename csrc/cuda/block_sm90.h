// The whole block in one kernel for Hopper: the hidden tensor never leaves the multiprocessor.
//
// A thread block is one producer warp, which does nothing but start copies of weights, and two to four consumer
// warpgroups, each with a slot of 64 rows. For every chunk of hidden channels a consumer multiplies z by a panel of fc1
// (sums in registers), takes GELU in place, and multiplies the result, as it lies in its registers, by a panel of fc2:
//
//     h = z W1_j^T        64 x kChunk sums; z [64, C] and the panel [kChunk, C] in shared memory
//     out += gelu(h) W2_j^T    64 x C sums; gelu(h) in registers, the panel [C, kChunk] in shared memory
//
// The second product runs on while the next chunk's first one is started (but at C = 192 and 384); a consumer's GELU
// overlaps the products of the others. Panels arrive in a ring, W1_0, W2_0, W1_1, ...; each has C * kChunk values.
// Where all of them fit (C <= 96) they are loaded once and stay. For C >= 320 two thread blocks form a cluster and each
// loads half of every panel for both.
//
// Shared memory: barriers [1 KiB], consumers' tiles [kConsumers][64 x C], the ring [stages][C x kChunk].
// Cost of a slot: 16 * 64 * C^2 operations, and 64 * 4 C GELUs of 12 instructions. Weights read from L2: 16 C^2 bytes
// per thread block, so 1 / (32 kConsumers) bytes per multiply-add (half with clusters): at two consumers and the full
// matrix rate 32 bytes per clock and multiprocessor, about what the L2 gives; hence the clusters.
#pragma once

#include "slot_sm90.h"

namespace riformer::cuda {

constexpr int kMostConsumers = 4;

template <int C>
struct FusedConfig {
  // Registers decide: C / 2 sums of the second product, kChunk / 2 of the first and kChunk / 4 words of GELU's result.
  static constexpr int kConsumers = C <= 64 ? 4 : C <= 192 ? 3 : 2;
  static constexpr int kChunk = C <= 320 ? 64 : 32;
  static constexpr int kCluster = C >= 320 ? 2 : 1;
  // Whether a chunk's second product runs on under the next one's first. At 192 (with three consumers) and 384 the
  // registers do not hold both products' operands, and ptxas would put every single wgmma in a row; there the other
  // consumers fill the gap between chunks.
  static constexpr bool kRunsOn = C != 192 && C != 384;
  static constexpr int kSlotsPerTurn = kConsumers * kCluster;
  static constexpr int kParts = C > 192 ? 2 : 1;  // of the second product: at most 256 columns each
  static constexpr int kWidth = C / kParts;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  // The register file is handed out at the start in equal parts; the producer gives back, the consumers take.
  static constexpr int kConsumerRegisters = kConsumers == 4 ? 112 : kConsumers == 3 ? 160 : 240;
  static constexpr int kProducerRegisters = 24;

  static constexpr int kBlock = block_of(C);
  using Tile = SlotTile<kBlock>;
  static constexpr int kTileBytes = 2 * kSlotRows * C;
  static constexpr int kPanelBytes = 2 * C * kChunk;
  static constexpr int kFixedBytes = kBarrierBytes + kConsumers * kTileBytes;
  static constexpr int kRingStages = ring_stages(kFixedBytes, kPanelBytes);
  static_assert(kRingStages >= 2, "one panel of each weight at least");

  static int64_t panels(int64_t hidden) { return 2 * (hidden / kChunk); }
  // Clusters share panels, whose copies must stay in step: they are never kept.
  static bool resident(int64_t hidden) {
    return kCluster == 1 && panels(hidden) * kPanelBytes <= kSharedLimit - kFixedBytes;
  }
  static int stages(int64_t hidden) { return resident(hidden) ? static_cast<int>(panels(hidden)) : kRingStages; }
  static int64_t shared_bytes(int64_t hidden) {
    return kFixedBytes + static_cast<int64_t>(stages(hidden)) * kPanelBytes;
  }
};

struct FusedArgs {
  BlockKernelArgs block;
  TensorMap x, fc1, fc2;
  int slots;
  int stages;
  bool resident;
};

// From one turn of a cluster to its next.
template <int C>
RIFORMER_DEVICE int turn_step() {
  return opaque(static_cast<int>(block_count())) / FusedConfig<C>::kCluster;
}

template <int C>
RIFORMER_DEVICE void copy_panels(const FusedArgs& args, const Ring& ring, int turn) {
  using Config = FusedConfig<C>;
  constexpr int kBlock = Config::kBlock;
  constexpr int kShareRows = Config::kChunk / Config::kCluster, kShareColumns = C / Config::kCluster;
  constexpr uint16_t kBlocks = (1 << Config::kCluster) - 1;
  const int rank = Config::kCluster > 1 ? cluster_rank() : 0;
  const int chunks = args.block.hidden / Config::kChunk;
  RingPlace place;
  for (; turn * Config::kSlotsPerTurn < args.slots; turn += turn_step<C>()) {
    RIFORMER_NO_UNROLL  // in 24 registers
        for (int chunk = 0; chunk < chunks; ++chunk) {
      for (int second = 0; second < 2; ++second) {
        unsigned char* panel = ring.panel(place.stage);
        uint64_t* full = ring.full + place.stage;
        barrier_wait(ring.empty + place.stage, place.parity ^ 1);
        barrier_arrive_expect(full, Config::kPanelBytes);
        if (second) {
          constexpr int kRow = 2 * Config::kChunk;
          unsigned char* to = panel + rank * kShareColumns * kRow;
          if (Config::kCluster > 1)
            copy_box_to(to, &args.fc2, full, chunk * Config::kChunk, rank * kShareColumns, kBlocks);
          else
            copy_box(to, &args.fc2, full, chunk * Config::kChunk, 0);
        } else {
          const int row = chunk * Config::kChunk + rank * kShareRows;
          for (int c = 0; c < C; c += kBlock) {
            unsigned char* to = panel + (c * Config::kChunk + rank * kShareRows * kBlock) * 2;
            if (Config::kCluster > 1)
              copy_box_to(to, &args.fc1, full, c, row, kBlocks);
            else
              copy_box(to, &args.fc1, full, c, row);
          }
        }
        place.next(ring.stages);
      }
    }
    if (args.resident) break;
  }
}

// To every block of the cluster that shares the panel.
template <int C>
RIFORMER_DEVICE void release_panel(const Ring& ring, int stage, bool resident) {
  if (resident) return;
  if (FusedConfig<C>::kCluster == 1) return release(ring, stage);
  if (thread_index() % kWarp) return;
  RIFORMER_UNROLL
  for (int rank = 0; rank < FusedConfig<C>::kCluster; ++rank) barrier_arrive_at(ring.empty + stage, rank);
}

// h to T after GELU, as the A operand of the second product: two groups of eight columns are sixteen k.
template <class T, int Chunk>
RIFORMER_DEVICE void gelu_fragments(const float (&h)[Chunk / 2], const float* bias, uint32_t (&g)[Chunk / 16][4],
                                    int t) {
  RIFORMER_UNROLL
  for (int j = 0; j < Chunk / 8; ++j) {
    const Pair b = load_pair(bias + 8 * j + 2 * (t % 4));
    g[j / 2][j % 2 * 2] = pack<T>(gelu<T>(h[4 * j] + b.value[0]), gelu<T>(h[4 * j + 1] + b.value[1]));
    g[j / 2][j % 2 * 2 + 1] = pack<T>(gelu<T>(h[4 * j + 2] + b.value[0]), gelu<T>(h[4 * j + 3] + b.value[1]));
  }
}

// The thread's number in its warpgroup and the warpgroup's own, found anew where they are needed.
RIFORMER_DEVICE int group_thread() { return opaque(thread_index()) % kWarpgroup; }
RIFORMER_DEVICE int group_index() { return opaque(thread_index()) / kWarpgroup; }
RIFORMER_DEVICE void sync_group() { sync_named(1 + group_index(), kWarpgroup); }

// A warpgroup's tile, where it keeps its turn and its place in the ring, and its slot of a turn.
template <int C>
RIFORMER_DEVICE unsigned char* group_tile() {
  return shared_memory() + kBarrierBytes + group_index() * FusedConfig<C>::kTileBytes;
}
RIFORMER_DEVICE uint32_t* group_words(const Ring& ring) {
  return reinterpret_cast<uint32_t*>(ring.arrived(kMostConsumers + group_index()));
}
template <int C>
RIFORMER_DEVICE int group_slot(int turn) {
  using Config = FusedConfig<C>;
  const int rank = Config::kCluster > 1 ? cluster_rank() : 0;
  return (turn * Config::kCluster + rank) * Config::kConsumers + group_index();
}

// A slot's tokens into the warpgroup's tile, over what lay there: every thread has to be done with that.
template <int C>
RIFORMER_DEVICE void load_tokens(const FusedArgs& args, const Ring& ring, const Slot& slot, int parity) {
  fence_async();
  sync_group();
  uint64_t* arrived = ring.arrived(group_index());
  if (group_thread() == 0) copy_slot<FusedConfig<C>::kBlock>(&args.x, slot, 0, C, group_tile<C>(), arrived);
  barrier_wait(arrived, parity);
}

template <class T, int C>
RIFORMER_DEVICE void consume(const FusedArgs& args, const Ring& ring, int turn) {
  using Config = FusedConfig<C>;
  using Tile = typename Config::Tile;
  constexpr int kBlock = Config::kBlock;
  constexpr int kChunk = Config::kChunk, kParts = Config::kParts, kWidth = Config::kWidth, kPanelRow = 2 * kChunk;
  const int chunks = args.block.hidden / kChunk;
  RingPlace place;
  for (; turn * Config::kSlotsPerTurn < args.slots; turn += turn_step<C>()) {
    // Beyond the last slot there are no rows, but the panels still have to be taken from the ring.
    Slot slot = slot_of(args.block, args.slots, group_slot<C>(turn));
    // The sums leave no registers for these at C = 384.
    if (group_thread() == 0) store_word(group_words(ring), static_cast<uint32_t>(turn));
    load_tokens<C>(args, ring, slot, 0);
    norm_slot<T, kBlock>(args.block, C, slot, group_tile<C>(), group_thread());
    fence_async();
    sync_group();
    // Zeros, and not a first product that ignores them: that would keep the last turn's sums alive until here.
    float sums[kParts][kWidth / 2] = {};
    float h[kChunk / 2];
    uint32_t g[kChunk / 16][4];
    int held = 0;
    RIFORMER_NO_UNROLL
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int first = place.stage;
      barrier_wait(ring.full + first, place.parity);
      place.next(ring.stages);
      // Here and not before the loop, or every piece's descriptor is kept in registers all the while.
      const uint64_t z = descriptor<Tile::kRowBytes>(group_tile<C>());
      const uint64_t fc1 = descriptor<Tile::kRowBytes>(ring.panel(first));
      product_fence();
      RIFORMER_UNROLL
      for (int c = 0; c < C; c += 16) {
        const int piece = c / kBlock, inside = c % kBlock * 2;
        product<T, kChunk>(h, advanced(z, piece * Tile::kPieceBytes + inside),
                           advanced(fc1, piece * kChunk * Tile::kRowBytes + inside), c > 0);
      }
      product_commit();
      if (Config::kRunsOn && chunk > 0) {
        product_wait<1>();
        release_panel<C>(ring, held, args.resident);
      }
      product_wait<0>();
      keep_after_wait(h);
      release_panel<C>(ring, first, args.resident);
      gelu_fragments<T, kChunk>(h, args.block.constants + chunk * kChunk, g, group_thread());
      held = place.stage;
      barrier_wait(ring.full + held, place.parity);
      place.next(ring.stages);
      const uint64_t fc2 = descriptor<kPanelRow>(ring.panel(held));
      product_fence();
      RIFORMER_UNROLL
      for (int k = 0; k < kChunk / 16; ++k) {
        RIFORMER_UNROLL
        for (int part = 0; part < kParts; ++part)
          product<T, kWidth>(sums[part], g[k], advanced(fc2, part * kWidth * kPanelRow + 32 * k), true);
      }
      product_commit();
      if (!Config::kRunsOn) {
        product_wait<0>();
        release_panel<C>(ring, held, args.resident);
      }
    }
    product_wait<0>();
    RIFORMER_UNROLL
    for (int part = 0; part < kParts; ++part) keep_after_wait(sums[part]);
    if (Config::kRunsOn) release_panel<C>(ring, held, args.resident);
    if (args.resident) place = RingPlace{};
    if (group_thread() == 0) store_word(group_words(ring) + 1, static_cast<uint32_t>(2 * place.stage + place.parity));
    slot = slot_of(args.block, args.slots, group_slot<C>(static_cast<int>(load_word(group_words(ring)))));
    load_tokens<C>(args, ring, slot, 1);
    RIFORMER_UNROLL
    for (int part = 0; part < kParts; ++part)
      finish_columns<T, kBlock, kWidth>(args.block, C, slot, sums[part], part * kWidth, part * kWidth, group_tile<C>(),
                                        group_thread());
    // Read before the barrier, as the next turn writes them.
    turn = static_cast<int>(load_word(group_words(ring)));
    const int saved = static_cast<int>(load_word(group_words(ring) + 1));
    place = {saved / 2, saved % 2};
    sync_group();
    leave_slot<T, kBlock>(args.block, C, group_slot<C>(turn), 0, C, slot, group_tile<C>(), group_thread());
  }
}

template <class T, int C>
RIFORMER_KERNEL(FusedConfig<C>::kThreads, 1)
fused_sm90(RIFORMER_GRID_CONSTANT FusedArgs args) {
  using Config = FusedConfig<C>;
  const Ring ring = ring_at(Config::kFixedBytes, args.stages, Config::kPanelBytes);
  if (thread_index() == 0)
    ring_init(ring, Config::kCluster * Config::kConsumers * (kWarpgroup / kWarp), Config::kConsumers);
  if (Config::kCluster > 1)
    sync_cluster();
  else
    sync_block();
  // Every block of a cluster takes the same number of turns, as they wait for each other's panels.
  const int first = static_cast<int>(block_index()) / Config::kCluster;
  if (thread_index() / kWarpgroup == Config::kConsumers) {
    registers_down<Config::kProducerRegisters>();
    if (thread_index() % kWarpgroup == 0) copy_panels<C>(args, ring, first);
    if (Config::kCluster > 1) sync_warp();  // its barrier takes whole warps; without one this would cost spills
  } else {
    registers_up<Config::kConsumerRegisters>();
    consume<T, C>(args, ring, first);
  }
  // A block of a cluster must not end while the other may still write into it.
  if (Config::kCluster > 1) sync_cluster();
}

}  // namespace riformer::cuda
