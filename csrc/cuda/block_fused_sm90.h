// The whole block in one kernel for Hopper: the hidden tensor never leaves the multiprocessor.
//
// A thread block is a producer and two to four consumers. The producer is one thread, which does nothing but start
// copies of weights. A consumer is a warpgroup with a slot of 64 rows. It goes through the hidden channels in chunks:
//
//     h = z W1_j^T             64 x kChunk sums, of z [64, C] and a panel of fc1 [kChunk, C], both in shared memory
//     out += gelu(h) W2_j^T    64 x C sums, of gelu(h) in registers and a panel of fc2 [C, kChunk] in shared memory
//
// The panels of weights come through a ring: W1_0, W2_0, W1_1, W2_1, ... Each has C * kChunk elements. Where all of
// them fit into shared memory (C <= 96) they are loaded once and stay. For C >= 320 two thread blocks form a cluster,
// and each loads half of every panel for both. The GELU of one consumer overlaps the products of the others.
//
// Shared memory: barriers [1 KiB], the consumers' tiles [kConsumers][64 x C], the ring [stages][C x kChunk].
// Cost of a slot: 16 * 64 * C^2 operations and 64 * 4 C GELUs of 12 instructions. The weights cost 1 / (32 kConsumers)
// bytes of L2 per multiply-add. At two consumers and the full matrix rate that is 32 bytes per clock and
// multiprocessor, about what the L2 gives; clusters halve it.
#pragma once

#include "slot_sm90.h"

namespace riformer::cuda {

constexpr int kMostConsumers = 4;

template <class T, int C>
struct FusedConfig {
  // Registers decide: C / 2 sums of the second product, kChunk / 2 of the first and kChunk / 4 words of GELU's result.
  static constexpr int kConsumers = C <= 64 ? 4 : C <= 192 ? 3 : 2;
  static constexpr int kChunk = C <= 320 ? 64 : 32;
  static constexpr int kCluster = C >= 320 ? 2 : 1;
  // Whether the second product of a chunk is still under way when the first product of the next chunk starts. At C =
  // 192 and 384 the registers do not hold the operands of both, and ptxas would run all wgmma one after the other.
  // There the other consumers fill the gap between chunks.
  static constexpr bool kOverlapsChunks = C != 192 && C != 384;
  static constexpr int kSlotsPerTurn = kConsumers * kCluster;
  static constexpr int kParts = C > 192 ? 2 : 1;  // of the second product, as one wgmma has at most 256 columns
  static constexpr int kWidth = C / kParts;       // columns of a part
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  // At the start all warpgroups have the same number of registers. Then the producer gives some back and the consumers
  // take them.
  static constexpr int kConsumerRegisters = kConsumers == 4 ? 112 : kConsumers == 3 ? 160 : 240;
  static constexpr int kProducerRegisters = 24;

  static constexpr int kStrip = strip_width<T>(C);
  using Tile = SlotTile<T, kStrip>;
  static constexpr int kTileBytes = kElementBytes<T> * kSlotRows * C;
  static constexpr int kPanelBytes = kElementBytes<T> * C * kChunk;
  static constexpr int kFixedBytes = kBarrierBytes + kConsumers * kTileBytes;
  static constexpr int kRingStages = ring_stages(kFixedBytes, kPanelBytes);
  static_assert(kRingStages >= 2, "at least one panel of each weight");

  static int64_t panels(int64_t hidden) { return 2 * (hidden / kChunk); }
  // Whether all panels stay in shared memory. Never in a cluster, whose thread blocks copy panels for each other and
  // have to stay in step.
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

// In a turn every consumer of a cluster takes one slot. Turns are numbered over all clusters; this is the distance
// between two turns of the same cluster.
template <class Config>
RIFORMER_DEVICE int turn_step() {
  return opaque(static_cast<int>(thread_block_count())) / Config::kCluster;
}

// The producer: copies the panels of every turn into the ring, in the order in which the consumers use them.
template <class T, int C>
RIFORMER_DEVICE void produce(const FusedArgs& args, const Ring& ring, int turn) {
  using Config = FusedConfig<T, C>;
  constexpr int kStrip = Config::kStrip;
  // What this thread block copies of each panel for the whole cluster.
  constexpr int kShareRows = Config::kChunk / Config::kCluster, kShareColumns = C / Config::kCluster;
  constexpr uint16_t kRanks = (1 << Config::kCluster) - 1;
  const int rank = Config::kCluster > 1 ? cluster_rank() : 0;
  const int chunks = args.block.hidden / Config::kChunk;
  RingPlace place;
  for (; turn * Config::kSlotsPerTurn < args.slots; turn += turn_step<Config>()) {
    // Not unrolled: the producer has 24 registers.
    RIFORMER_NO_UNROLL
    for (int chunk = 0; chunk < chunks; ++chunk) {
      for (int second = 0; second < 2; ++second) {
        // Wait until the consumers have released the panel, and announce the bytes of the next one.
        unsigned char* panel = ring.panel(place.stage);
        uint64_t* full = ring.full + place.stage;
        barrier_wait(ring.empty + place.stage, place.parity ^ 1);
        barrier_arrive_expect(full, Config::kPanelBytes);
        if (second) {
          // fc2's panel: all C rows of kChunk columns, in one box.
          constexpr int kRowBytes = kElementBytes<T> * Config::kChunk;
          unsigned char* to = panel + rank * kShareColumns * kRowBytes;
          if (Config::kCluster > 1)
            copy_box_to(to, &args.fc2, full, chunk * Config::kChunk, rank * kShareColumns, kRanks);
          else
            copy_box(to, &args.fc2, full, chunk * Config::kChunk, 0);
        } else {
          // fc1's panel: kChunk rows of all C columns, a box for each strip.
          const int row = chunk * Config::kChunk + rank * kShareRows;
          for (int c = 0; c < C; c += kStrip) {
            unsigned char* to = panel + (c * Config::kChunk + rank * kShareRows * kStrip) * kElementBytes<T>;
            if (Config::kCluster > 1)
              copy_box_to(to, &args.fc1, full, c, row, kRanks);
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

// Releases a panel to the producer of every thread block of the cluster, as each of them fills a share of it.
template <class Config>
RIFORMER_DEVICE void release_panel(const Ring& ring, int stage, bool resident) {
  if (resident) return;
  if (Config::kCluster == 1) return release(ring, stage);
  if (thread_index() % kWarp) return;
  RIFORMER_UNROLL
  for (int rank = 0; rank < Config::kCluster; ++rank) barrier_arrive_at(ring.empty + stage, rank);
}

// GELU of the first product's sums, as operand a of the second product. A thread's places in the sums of two groups of
// eight columns are its places in an operand of 16 k.
template <class T, int Chunk>
RIFORMER_DEVICE void gelu_fragments(const float (&h)[Chunk / 2], const float* bias, uint32_t (&g)[Chunk / 16][4],
                                    int t) {
  static_assert(kProductDepth<T> == 16, "an operand of 16 k");
  RIFORMER_UNROLL
  for (int j = 0; j < Chunk / 8; ++j) {
    const Pair b = load_pair(bias + 8 * j + 2 * (t % 4));
    g[j / 2][j % 2 * 2] = pack<T>(gelu<T>(h[4 * j] + b.value[0]), gelu<T>(h[4 * j + 1] + b.value[1]));
    g[j / 2][j % 2 * 2 + 1] = pack<T>(gelu<T>(h[4 * j + 2] + b.value[0]), gelu<T>(h[4 * j + 3] + b.value[1]));
  }
}

// The thread's number in its warpgroup, and the warpgroup's. Computed again at each use, as registers are short.
RIFORMER_DEVICE int warpgroup_thread() { return opaque(thread_index()) % kWarpgroup; }
RIFORMER_DEVICE int warpgroup_index() { return opaque(thread_index()) / kWarpgroup; }
RIFORMER_DEVICE void sync_warpgroup() { sync_named(1 + warpgroup_index(), kWarpgroup); }

// The tile of a consumer.
template <class Config>
RIFORMER_DEVICE unsigned char* warpgroup_tile() {
  return shared_memory() + kBarrierBytes + warpgroup_index() * Config::kTileBytes;
}
// Two words of shared memory, behind the barriers, where a consumer keeps its turn and its place in the ring while the
// sums need the registers.
RIFORMER_DEVICE uint32_t* warpgroup_words(const Ring& ring) {
  return reinterpret_cast<uint32_t*>(ring.arrived(kMostConsumers + warpgroup_index()));
}
// The number of the slot that a consumer takes in a turn.
template <class Config>
RIFORMER_DEVICE int warpgroup_slot(int turn) {
  const int rank = Config::kCluster > 1 ? cluster_rank() : 0;
  return (turn * Config::kCluster + rank) * Config::kConsumers + warpgroup_index();
}

// Copies a slot's tokens to the consumer's tile and waits for them. The tile is overwritten, so all threads have to be
// done with what was in it. `parity`: of the phase of the consumer's barrier, which has two phases a turn.
template <class T, int C>
RIFORMER_DEVICE void load_tokens(const FusedArgs& args, const Ring& ring, const Slot& slot, int parity) {
  using Config = FusedConfig<T, C>;
  fence_async();
  sync_warpgroup();
  uint64_t* arrived = ring.arrived(warpgroup_index());
  if (warpgroup_thread() == 0) copy_slot<T, Config::kStrip>(&args.x, slot, 0, C, warpgroup_tile<Config>(), arrived);
  barrier_wait(arrived, parity);
}

// A consumer: takes a slot in every turn.
template <class T, int C>
RIFORMER_DEVICE void consume(const FusedArgs& args, const Ring& ring, int turn) {
  using Config = FusedConfig<T, C>;
  using Tile = typename Config::Tile;
  constexpr int kStrip = Config::kStrip, kDepth = kProductDepth<T>;
  constexpr int kChunk = Config::kChunk, kParts = Config::kParts, kWidth = Config::kWidth;
  constexpr int kPanelRow = kElementBytes<T> * kChunk;
  const int chunks = args.block.hidden / kChunk;
  RingPlace place;
  for (; turn * Config::kSlotsPerTurn < args.slots; turn += turn_step<Config>()) {
    // A slot behind the last has no rows, but its consumer still has to release the panels.
    Slot slot = slot_at_32(args.block, args.slots, warpgroup_slot<Config>(turn));
    // The turn goes to shared memory, as the sums leave no register for it at C = 384.
    if (warpgroup_thread() == 0) store_word(warpgroup_words(ring), static_cast<uint32_t>(turn));

    // Load x and norm it in place.
    load_tokens<T, C>(args, ring, slot, 0);
    norm_slot<T, kStrip>(args.block, C, slot, warpgroup_tile<Config>(), warpgroup_thread());
    fence_async();
    sync_warpgroup();

    // Set to zero here, and not by a first product that ignores what was there before: that would keep the registers of
    // the last turn's sums occupied until then.
    float sums[kParts][kWidth / 2] = {};
    float h[kChunk / 2];
    uint32_t g[kChunk / kDepth][4];
    int held = 0;
    RIFORMER_NO_UNROLL
    for (int chunk = 0; chunk < chunks; ++chunk) {
      // Wait for the panel of fc1.
      const int first = place.stage;
      barrier_wait(ring.full + first, place.parity);
      place.next(ring.stages);

      // First product: h = z W1_j^T. The descriptors are made inside the loop, or each of them would stay in registers
      // throughout.
      const uint64_t z = descriptor<Tile::kRowBytes>(warpgroup_tile<Config>());
      const uint64_t fc1 = descriptor<Tile::kRowBytes>(ring.panel(first));
      product_fence();
      RIFORMER_UNROLL
      for (int c = 0; c < C; c += kDepth) {
        const int strip = c / kStrip, inside = c % kStrip * kElementBytes<T>;
        product<T, kChunk>(h, advanced(z, strip * Tile::kStripBytes + inside),
                           advanced(fc1, strip * kChunk * Tile::kRowBytes + inside), c > 0);
      }
      product_commit();

      // Wait for the last chunk's second product, which has run meanwhile, then for the first product.
      if (Config::kOverlapsChunks && chunk > 0) {
        product_wait<1>();
        release_panel<Config>(ring, held, args.resident);
      }
      product_wait<0>();
      keep_after_wait(h);
      release_panel<Config>(ring, first, args.resident);

      // GELU, in registers.
      gelu_fragments<T, kChunk>(h, args.block.constants + chunk * kChunk, g, warpgroup_thread());

      // Wait for the panel of fc2.
      held = place.stage;
      barrier_wait(ring.full + held, place.parity);
      place.next(ring.stages);

      // Second product: sums += gelu(h) W2_j^T.
      const uint64_t fc2 = descriptor<kPanelRow>(ring.panel(held));
      product_fence();
      RIFORMER_UNROLL
      for (int k = 0; k < kChunk / kDepth; ++k) {
        RIFORMER_UNROLL
        for (int part = 0; part < kParts; ++part)
          product<T, kWidth>(sums[part], g[k], advanced(fc2, part * kWidth * kPanelRow + kProductBytes * k), true);
      }
      product_commit();
      if (!Config::kOverlapsChunks) {
        product_wait<0>();
        release_panel<Config>(ring, held, args.resident);
      }
    }

    // The last chunk's second product.
    product_wait<0>();
    RIFORMER_UNROLL
    for (int part = 0; part < kParts; ++part) keep_after_wait(sums[part]);
    if (Config::kOverlapsChunks) release_panel<Config>(ring, held, args.resident);
    if (args.resident) place = RingPlace{};
    if (warpgroup_thread() == 0)
      store_word(warpgroup_words(ring) + 1, static_cast<uint32_t>(2 * place.stage + place.parity));

    // Load x again, for the residual, and finish the slot in its place.
    slot =
        slot_at_32(args.block, args.slots, warpgroup_slot<Config>(static_cast<int>(load_word(warpgroup_words(ring)))));
    load_tokens<T, C>(args, ring, slot, 1);
    RIFORMER_UNROLL
    for (int part = 0; part < kParts; ++part)
      finish_columns<T, kStrip, kWidth>(args.block, C, slot, sums[part], part * kWidth, part * kWidth,
                                        warpgroup_tile<Config>(), warpgroup_thread());

    // The words are read before the barrier, because the next turn overwrites them.
    turn = static_cast<int>(load_word(warpgroup_words(ring)));
    const int saved = static_cast<int>(load_word(warpgroup_words(ring) + 1));
    place = {saved / 2, saved % 2};
    sync_warpgroup();
    store_slot_and_moments<T, kStrip>(args.block, C, warpgroup_slot<Config>(turn), 0, C, slot, warpgroup_tile<Config>(),
                                      warpgroup_thread());
  }
}

template <class T, int C>
RIFORMER_KERNEL((FusedConfig<T, C>::kThreads), 1)
fused_sm90(RIFORMER_GRID_CONSTANT FusedArgs args) {
  using Config = FusedConfig<T, C>;
  const Ring ring = ring_at(Config::kFixedBytes, args.stages, Config::kPanelBytes);
  if (thread_index() == 0)
    ring_init(ring, Config::kCluster * Config::kConsumers * (kWarpgroup / kWarp), Config::kConsumers);
  if (Config::kCluster > 1)
    sync_cluster();
  else
    sync_thread_block();
  // All thread blocks of a cluster take the same number of turns, as they wait for each other's panels.
  const int first = static_cast<int>(thread_block_index()) / Config::kCluster;
  if (thread_index() / kWarpgroup == Config::kConsumers) {
    registers_down<Config::kProducerRegisters>();
    if (thread_index() % kWarpgroup == 0) produce<T, C>(args, ring, first);
    // sync_cluster takes whole warps. Without a cluster this line would cost spills.
    if (Config::kCluster > 1) sync_warp();
  } else {
    registers_up<Config::kConsumerRegisters>();
    consume<T, C>(args, ring, first);
  }
  // A thread block must not end while another of its cluster may still write into its shared memory.
  if (Config::kCluster > 1) sync_cluster();
}

}  // namespace riformer::cuda
