// What the sm_90 kernels of a block do to the rows of a slot, by one warpgroup: before the first product (the norm,
// into a tile that wgmma reads) and after the second (residual, moments, stores). And the ring through which the
// operands of the products reach the warpgroups.
//
// The tile of a slot lies in shared memory as strips of 64 rows, one behind the other. A strip is as many channels wide
// as a row of the swizzle takes: 128 bytes, or 64 where the channels are no multiple of that.
#pragma once

#include "block_args.h"
#include "gelu.h"
#include "hopper.h"
#include "slot_epilogue.h"

namespace riformer::cuda {

// The channels of a strip, for tiles of `channels`.
template <class T>
constexpr int strip_width(int channels) {
  constexpr int kWidest = 128 / kElementBytes<T>;
  return channels % kWidest == 0 ? kWidest : kWidest / 2;
}

template <class T, int Strip>
struct SlotTile {
  static constexpr int kRowBytes = kElementBytes<T> * Strip;
  static constexpr int kStripBytes = kSlotRows * kRowBytes;

  // Byte offset of channel `c` of a row: swizzled<kRowBytes>() of its place in the strip. The part of the swizzle that
  // depends on the row is computed apart from what depends on the channel.
  static RIFORMER_DEVICE int at(int row, int c) {
    const int exchange = kRowBytes == 128 ? row % 8 * 16 : row / 2 % 4 * 16;
    return c / Strip * kStripBytes + row * kRowBytes + (c % Strip * kElementBytes<T> ^ exchange);
  }
};

// slot_at in 32 bits, which suffice because the copy engine counts rows in 32 bits. A 64-bit division is a call, and
// would take registers from the sums. A slot behind the last has no rows.
RIFORMER_DEVICE Slot slot_at_32(const BlockKernelArgs& args, int slots, int index) {
  if (index >= slots) return {0, 0};
  const int per_image = static_cast<int>(args.slots_per_image), positions = static_cast<int>(args.positions);
  int first = index * kSlotRows, end = static_cast<int>(args.rows);
  if (per_image) {
    const int image = index / per_image;
    first = image * positions + (index - image * per_image) * kSlotRows;
    end = (image + 1) * positions;
  }
  return {first, end - first < kSlotRows ? end - first : kSlotRows};
}
// The image of a row, in 32 bits for the same reason.
RIFORMER_DEVICE int image_of(const BlockKernelArgs& args, int64_t row) {
  return static_cast<int>(row) / static_cast<int>(args.positions);
}

// A map's values for eight channels.
struct Eight {
  float value[8];
};
RIFORMER_DEVICE Eight load_eight(const float* from) {
  Eight out;
  RIFORMER_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Vec16 part = load_16(from + 4 * i);
    memcpy(out.value + 4 * i, part.word, 16);
  }
  return out;
}

// What thread `t` of a warpgroup norms: the same piece (of eight columns) of every `step`-th row from `row` on. So the
// maps of its columns stay in registers while the image is the same. At most 1024 columns.
struct NormShare {
  int piece, row, step;
};
RIFORMER_DEVICE NormShare norm_share(int columns, int t) {
  const int pieces = columns / 8, step = kWarpgroup / pieces;
  return {t % pieces, t / pieces < step ? t / pieces : kSlotRows, step};
}

// Starts the copy of columns [begin, begin + columns) of a slot's tokens to a tile, by one thread. It always copies 64
// rows: those behind a short slot are read by nobody.
template <class T, int Strip>
RIFORMER_DEVICE void copy_slot(const TensorMap* tokens, const Slot& slot, int begin, int columns, unsigned char* tile,
                               uint64_t* arrived) {
  barrier_arrive_expect(arrived, kElementBytes<T> * kSlotRows * columns);
  for (int c = 0; c < columns; c += Strip)
    copy_box(tile + c / Strip * SlotTile<T, Strip>::kStripBytes, tokens, arrived, begin + c,
             static_cast<int>(slot.first));
}

template <class T, int Strip, bool PerPosition>
RIFORMER_DEVICE void norm_rows(const BlockKernelArgs& args, int C, const Slot& slot, unsigned char* tile, int t) {
  static_assert(sizeof(T) == 2, "a piece is eight channels");
  // The maps of the slot's first image, and `left`: the first row of the slot that belongs to the next image.
  const NormShare mine = norm_share(C, t);
  int image = image_of(args, slot.first);
  int left = PerPosition ? kSlotRows : (image + 1) * static_cast<int>(args.positions) - static_cast<int>(slot.first);
  if (PerPosition) image = 0;
  const float* maps = args.maps + int64_t{image} * 5 * C + mine.piece * 8;
  const float* mean = args.maps + (int64_t{image} * 5 + 4) * C;
  Eight u{}, w{}, p = load_eight(maps + 2 * C), q = load_eight(maps + 3 * C);
  if (PerPosition) u = load_eight(maps), w = load_eight(maps + C);
  RowStatistics row{*mean, 1.f, 0.f, 1.f};
  RIFORMER_NO_UNROLL
  for (int r = mine.row; r < kSlotRows; r += mine.step) {
    unsigned char* at = tile + SlotTile<T, Strip>::at(r, mine.piece * 8);
    Vec16 z{};
    if (r < slot.rows) {
      // The numbers of this row: its own with LayerNorm, those of its image with GroupNorm.
      if (PerPosition) {
        row = row_statistics(args, slot.first + r, args.maps);
      } else if (r >= left) {
        do left += static_cast<int>(args.positions), maps += 5 * C, mean += 5 * C;
        while (r >= left);
        p = load_eight(maps + 2 * C);
        q = load_eight(maps + 3 * C);
        row.mean = *mean;
      }
      // x to z, eight channels.
      z = load_16(at);
      RIFORMER_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float low = normed<PerPosition>(unpack_low<T>(z.word[j]), row, u.value[2 * j], w.value[2 * j],
                                              p.value[2 * j], q.value[2 * j]);
        const float high = normed<PerPosition>(unpack_high<T>(z.word[j]), row, u.value[2 * j + 1], w.value[2 * j + 1],
                                               p.value[2 * j + 1], q.value[2 * j + 1]);
        z.word[j] = pack<T>(low, high);
      }
    }
    // Rows behind a short slot become zeros.
    store_16(at, z);
  }
}

// Replaces x by z in a tile of all C channels.
template <class T, int Strip>
RIFORMER_DEVICE void norm_slot(const BlockKernelArgs& args, int C, const Slot& slot, unsigned char* tile, int t) {
  if (args.statistics)
    norm_rows<T, Strip, true>(args, C, slot, tile, t);
  else
    norm_rows<T, Strip, false>(args, C, slot, tile, t);
}

// Writes the results that lie in a tile to global memory: the tokens, and their moments where args.partials wants them.
// `index` is the number of the slot; the tile has columns [begin, begin + columns).
template <class T, int Strip>
RIFORMER_DEVICE void store_slot_and_moments(const BlockKernelArgs& args, int C, int64_t index, int begin, int columns,
                                            const Slot& slot, const unsigned char* tile, int t) {
  const auto at = [tile](int row, int piece) { return tile + SlotTile<T, Strip>::at(row, piece * kPerPiece<T>); };
  const int pieces = columns / kPerPiece<T>;
  if (args.partials && slot.rows)
    slot_moments<T>(at, slot.rows, pieces, t / kWarp, kWarpgroup / kWarp, args.partials + index * 2 * C + begin, C);
  store_slot(at, slot.rows, pieces, static_cast<T*>(args.out) + slot.first * C + begin,
             static_cast<int64_t>(sizeof(T)) * C, t, kWarpgroup);
}

// Replaces x by the block's result in a tile, from the second product's sums of N columns. The first of these is column
// `channel` of all and `column` of the tile. Rows behind a short slot are computed like its first; nobody reads them.
template <class T, int Strip, int N>
RIFORMER_DEVICE void finish_columns(const BlockKernelArgs& args, int C, const Slot& slot, const float (&sums)[N / 2],
                                    int channel, int column, unsigned char* tile, int t) {
  static_assert(sizeof(T) == 2, "a word is two channels");
  const int pair = 2 * (t % 4);
  const float* scales = args.constants + args.hidden + channel + pair;
  RIFORMER_UNROLL
  for (int half = 0; half < 2; ++half) {
    // The two rows of a thread are eight apart, as wgmma leaves its sums.
    const int r = t / kWarp * 16 + t % kWarp / 4 + 8 * half;
    // A slot without rows may start behind the last image.
    const int64_t of_all = slot.rows ? slot.first + (r < slot.rows ? r : 0) : 0;
    const float* maps = args.maps + (args.statistics ? 0 : int64_t{image_of(args, of_all)} * 5 * C);
    const RowStatistics row = row_statistics(args, of_all, maps);
    maps += channel + pair;
    int place = r;
    RIFORMER_UNROLL
    for (int j = 0; j < N / 8; ++j) {
      // Both lines keep ptxas from moving the loads of many columns up, which would spill `sums`: it does not move
      // loads over the barrier, and a shuffle that changes nothing hides that the addresses of two rows are related.
      sync_warp();
      if (j % 8 == 0) place = shuffle_xor(place, 0);
      const Pair scale = load_pair(scales + 8 * j), shift = load_pair(scales + C + 8 * j);
      const Pair u = load_pair(maps + 8 * j), w = load_pair(maps + C + 8 * j);
      unsigned char* at = tile + SlotTile<T, Strip>::at(place, column + 8 * j) + kElementBytes<T> * pair;
      const uint32_t word = load_word(at);
      const float low = finished(unpack_low<T>(word), row, u.value[0], w.value[0], sums[4 * j + 2 * half],
                                 scale.value[0], shift.value[0], args.residual);
      const float high = finished(unpack_high<T>(word), row, u.value[1], w.value[1], sums[4 * j + 2 * half + 1],
                                  scale.value[1], shift.value[1], args.residual);
      store_word(at, pack<T>(low, high));
    }
  }
}

constexpr int kSharedLimit = 232448;  // bytes of a thread block on sm_90 (CUDA programming guide)
constexpr int kBarrierBytes = 1024;

// A ring of panels in shared memory: of weights, and in `project` of rows of the hidden tensor too. The producer fills
// a panel, the consumers multiply by it and release it, and the producer fills it again.
//
// The barriers lie at the start of shared memory: full[stages], empty[stages], arrived[consumers]. full[i]: panel i has
// been copied. empty[i]: all consumers have released it. arrived[i]: the tokens of consumer i have been copied.
struct Ring {
  unsigned char* memory;
  uint64_t* full;
  uint64_t* empty;
  int stages, bytes;

  RIFORMER_DEVICE unsigned char* panel(int stage) const { return memory + stage * bytes; }
  RIFORMER_DEVICE uint64_t* arrived(int consumer) const { return empty + stages + consumer; }
};
// The ring whose panels, of `bytes` each, start `offset` bytes into shared memory.
RIFORMER_DEVICE Ring ring_at(int offset, int stages, int bytes) {
  unsigned char* memory = shared_memory();
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory);
  return {memory + offset, barriers, barriers + stages, stages, bytes};
}

// As many panels as fit beside `fixed` bytes, but no more than eight: those hide the latency of the L2.
constexpr int ring_stages(int64_t fixed, int64_t panel) {
  const int64_t stages = (kSharedLimit - fixed) / panel;
  return static_cast<int>(stages < 8 ? stages : 8);
}

// A place in the ring: the panel, and the parity of its barriers' phase in this round.
struct RingPlace {
  int stage = 0;
  int parity = 0;
  RIFORMER_DEVICE void next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Initialises the barriers, by one thread and before their first use. A panel is empty after `arrivals` releases.
RIFORMER_DEVICE void ring_init(const Ring& ring, int arrivals, int consumers) {
  for (int stage = 0; stage < ring.stages; ++stage) {
    barrier_init(ring.full + stage, 1);
    barrier_init(ring.empty + stage, arrivals);
  }
  for (int i = 0; i < consumers; ++i) barrier_init(ring.arrived(i), 1);
  barrier_init_fence();
}

// Releases a panel, by each warp of a consumer that has read it.
RIFORMER_DEVICE void release(const Ring& ring, int stage) {
  if (thread_index() % kWarp == 0) barrier_arrive(ring.empty + stage);
}

}  // namespace riformer::cuda
