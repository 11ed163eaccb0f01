// What the sm_90 kernels of a block do to the rows of a slot, by one warpgroup: before the first product (norm into a
// tile that wgmma reads) and after the second (residual, moments, stores).
//
// A slot's tile lies in shared memory as [C / Block] pieces of [64 rows] x [Block channels], rows swizzled; Block is 64
// channels (128 bytes), or 32 where 64 does not divide C.
#pragma once

#include "block_args.h"
#include "gelu.h"
#include "hopper.h"
#include "slot_epilogue.h"

namespace riformer::cuda {

constexpr int block_of(int channels) { return channels % 64 == 0 ? 64 : 32; }

template <int Block>
struct SlotTile {
  static constexpr int kRowBytes = 2 * Block;
  static constexpr int kPieceBytes = kSlotRows * kRowBytes;

  // Byte offset of channel `c` of a row.
  static RIFORMER_DEVICE int at(int row, int c) {
    // swizzled<kRowBytes>() of the place in the piece, with what depends on the row apart from what depends on the
    // channel.
    const int turn = Block == 64 ? row % 8 * 16 : row / 2 % 4 * 16;
    return c / Block * kPieceBytes + row * kRowBytes + (c % Block * 2 ^ turn);
  }
};

// slot_at and the image of a row in 32 bits, which is what the copy engine counts rows in; a 64-bit division is a call
// that takes registers from the sums. Without rows beyond the last slot.
RIFORMER_DEVICE Slot slot_of(const BlockKernelArgs& args, int slots, int index) {
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
RIFORMER_DEVICE int image_of(const BlockKernelArgs& args, int64_t row) {
  return static_cast<int>(row) / static_cast<int>(args.positions);
}

// Eight channels' worth of a map.
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

// Thread `t` of the warpgroup takes the same eight columns of every `step`-th row, so that the maps stay in registers
// while the image is the same. At most 1024 columns.
struct Spread {
  int piece, row, step;
};
RIFORMER_DEVICE Spread spread(int columns, int t) {
  const int pieces = columns / 8, step = kWarpgroup / pieces;
  return {t % pieces, t / pieces < step ? t / pieces : kSlotRows, step};
}

// Columns [begin, begin + columns) of a slot's tokens into a tile, by one thread; 64 rows, whatever is behind the slot.
template <int Block>
RIFORMER_DEVICE void copy_slot(const TensorMap* tokens, const Slot& slot, int begin, int columns, unsigned char* tile,
                               uint64_t* arrived) {
  barrier_arrive_expect(arrived, 2 * kSlotRows * columns);
  for (int c = 0; c < columns; c += Block)
    copy_box(tile + c / Block * SlotTile<Block>::kPieceBytes, tokens, arrived, begin + c, static_cast<int>(slot.first));
}

template <class T, int Block, bool PerPosition>
RIFORMER_DEVICE void norm_rows(const BlockKernelArgs& args, int C, const Slot& slot, unsigned char* tile, int t) {
  const Spread mine = spread(C, t);
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
    unsigned char* at = tile + SlotTile<Block>::at(r, mine.piece * 8);
    Vec16 z{};
    if (r < slot.rows) {
      if (PerPosition) {
        row = row_statistics(args, slot.first + r, args.maps);
      } else if (r >= left) {
        do left += static_cast<int>(args.positions), maps += 5 * C, mean += 5 * C;
        while (r >= left);
        p = load_eight(maps + 2 * C);
        q = load_eight(maps + 3 * C);
        row.mean = *mean;
      }
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
    store_16(at, z);
  }
}

// x in a tile becomes z; rows beyond the slot become zeros.
template <class T, int Block>
RIFORMER_DEVICE void norm_slot(const BlockKernelArgs& args, int C, const Slot& slot, unsigned char* tile, int t) {
  if (args.statistics)
    norm_rows<T, Block, true>(args, C, slot, tile, t);
  else
    norm_rows<T, Block, false>(args, C, slot, tile, t);
}

// Out of the tile: moments to `args.partials` where they are wanted, and the tokens.
template <class T, int Block>
RIFORMER_DEVICE void leave_slot(const BlockKernelArgs& args, int C, int64_t index, int begin, int columns,
                                const Slot& slot, const unsigned char* tile, int t) {
  const auto at = [tile](int row, int piece) { return tile + SlotTile<Block>::at(row, piece * 8); };
  if (args.partials && slot.rows)
    slot_moments<T>(at, slot.rows, columns / 8, t / kWarp, kWarpgroup / kWarp, args.partials + index * 2 * C + begin,
                    C);
  store_slot(at, slot.rows, columns / 8, static_cast<T*>(args.out) + slot.first * C + begin,
             static_cast<int64_t>(sizeof(T)) * C, t, kWarpgroup);
}

// Sums of the second product, N columns from `channel` on, over the tokens in the tile's columns from `column` on: x
// becomes out. Rows beyond the slot are computed like its first; nobody reads them.
template <class T, int Block, int N>
RIFORMER_DEVICE void finish_columns(const BlockKernelArgs& args, int C, const Slot& slot, const float (&sums)[N / 2],
                                    int channel, int column, unsigned char* tile, int t) {
  const int pair = 2 * (t % 4);
  const float* scales = args.constants + args.hidden + channel + pair;
  RIFORMER_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int r = t / kWarp * 16 + t % kWarp / 4 + 8 * half;
    // A slot without rows may start behind the last image.
    const int64_t of_all = slot.rows ? slot.first + (r < slot.rows ? r : 0) : 0;
    const float* maps = args.maps + (args.statistics ? 0 : int64_t{image_of(args, of_all)} * 5 * C);
    const RowStatistics row = row_statistics(args, of_all, maps);
    maps += channel + pair;
    int place = r;
    RIFORMER_UNROLL
    for (int j = 0; j < N / 8; ++j) {
      // Or the loads of many columns move up together, and the sums go to local memory to make room for them; a value
      // out of a shuffle is one that the assembler does not find again in another row's or piece's addresses.
      sync_warp();
      if (j % 8 == 0) place = shuffle_xor(place, 0);
      const Pair scale = load_pair(scales + 8 * j), shift = load_pair(scales + C + 8 * j);
      const Pair u = load_pair(maps + 8 * j), w = load_pair(maps + C + 8 * j);
      unsigned char* at = tile + SlotTile<Block>::at(place, column + 8 * j) + 2 * pair;
      const uint32_t word = load_word(at);
      const float low = finished(unpack_low<T>(word), row, u.value[0], w.value[0], sums[4 * j + 2 * half],
                                 scale.value[0], shift.value[0], args.residual);
      const float high = finished(unpack_high<T>(word), row, u.value[1], w.value[1], sums[4 * j + 2 * half + 1],
                                  scale.value[1], shift.value[1], args.residual);
      store_word(at, pack<T>(low, high));
    }
  }
}

constexpr int kSharedLimit = 232448;  // of a thread block, sm_90 (CUDA programming guide)
constexpr int kBarrierBytes = 1024;

// A ring of panels: the producer fills, the consumers release. The barriers lie at the start of shared memory, behind
// the ring's those that the consumers' tiles are reported to.
struct Ring {
  unsigned char* memory;
  uint64_t* full;
  uint64_t* empty;
  int stages, bytes;

  RIFORMER_DEVICE unsigned char* panel(int stage) const { return memory + stage * bytes; }
  RIFORMER_DEVICE uint64_t* arrived(int consumer) const { return empty + stages + consumer; }
};
RIFORMER_DEVICE Ring ring_at(int offset, int stages, int bytes) {
  unsigned char* memory = shared_memory();
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory);
  return {memory + offset, barriers, barriers + stages, stages, bytes};
}

// As many panels as fit beside `fixed` bytes; eight are enough to hide the way from the L2.
constexpr int ring_stages(int64_t fixed, int64_t panel) {
  const int64_t stages = (kSharedLimit - fixed) / panel;
  return static_cast<int>(stages < 8 ? stages : 8);
}

// Where in the ring, and the parity of the barriers' phase there.
struct RingPlace {
  int stage = 0;
  int parity = 0;
  RIFORMER_DEVICE void next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// By one thread, before the barriers are used; `arrivals` of consumers release a panel.
RIFORMER_DEVICE void ring_init(const Ring& ring, int arrivals, int consumers) {
  for (int stage = 0; stage < ring.stages; ++stage) {
    barrier_init(ring.full + stage, 1);
    barrier_init(ring.empty + stage, arrivals);
  }
  for (int i = 0; i < consumers; ++i) barrier_init(ring.arrived(i), 1);
  barrier_init_fence();
}

// By a warp of a consumer that is done with a panel.
RIFORMER_DEVICE void release(const Ring& ring, int stage) {
  if (thread_index() % kWarp == 0) barrier_arrive(ring.empty + stage);
}

}  // namespace riformer::cuda
