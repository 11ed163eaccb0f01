// The moments of tokens: of slots of 64 rows, and of images from those of their slots.
#pragma once

#include "launch.h"
#include "slot_epilogue.h"
#include "statistics.h"

namespace riformer::cuda {

inline int64_t slots_in_image(int64_t positions) { return ceil_divide(positions, kSlotRows); }
// How many float32 values `partials` has, where kernels write the moments of each slot of a batch.
inline int64_t partials_count(int64_t batch, int64_t positions, int64_t channels) {
  return batch * slots_in_image(positions) * 2 * channels;
}

// ---------------------------------------------------------------------------------------------------------- merge

constexpr int kMergeColumns = 32, kMergeParts = 16;

// The moments of one image and channel from those of its slots, by the merge of Chan et al. in two passes over the
// slots:
//   m = sum n_s m_s / N,   V = sum V_s + n_s (m_s - m)^2
// Means are taken as differences from the first slot's, so that a large common mean takes no digits away. Each sum is
// made of kMergeParts parts (slots part, part + kMergeParts, ...), which are added upwards: an order that depends on N
// alone.
struct SlotColumn {
  const float* mean;  // of the first slot; the centred sum of squares lies `channels` further, the next slot `step`
  int64_t step, channels, slots, positions;

  RIFORMER_DEVICE float count(int64_t slot) const {
    const int64_t left = positions - slot * kSlotRows;
    return static_cast<float>(left < kSlotRows ? left : kSlotRows);
  }
  RIFORMER_DEVICE float mean_part(int part) const {
    const float first = *mean;
    float sum = 0.f;
    for (int64_t slot = part; slot < slots; slot += kMergeParts)
      sum = multiply_add(count(slot), mean[slot * step] - first, sum);
    return sum;
  }
  RIFORMER_DEVICE float centred_part(int part, float shift) const {
    const float first = *mean;
    float sum = 0.f;
    for (int64_t slot = part; slot < slots; slot += kMergeParts) {
      const float d = (mean[slot * step] - first) - shift;
      sum += multiply_add(count(slot) * d, d, mean[slot * step + channels]);
    }
    return sum;
  }
};

struct MergeArgs {
  const float* partials;  // [batch * slots_per_image, 2, C]
  float* moments;         // [batch, 2, C]
  int64_t positions, slots_per_image, channels;
};

// Merges the moments of slots into those of images. A thread block takes 32 channels of an image. Each of its 16 warps
// takes a part of the slots, and each lane a channel, so that a warp reads 128 bytes at a time. Shared memory: [16, 32]
// float32 for the means and [16, 32] for the centred sums. The kernel reads 8 bytes per channel for every 64 values
// that were written before it, 6 % of the tokens' bytes in 16 bits.
template <int Columns>
RIFORMER_KERNEL(Columns* kMergeParts, 2)
merge_kernel(RIFORMER_GRID_CONSTANT MergeArgs args) {
  float* const parts = reinterpret_cast<float*>(shared_memory());
  const int lane = thread_index() % Columns, part = thread_index() / Columns;
  const int64_t groups = ceil_divide(args.channels, Columns);
  const int64_t image = thread_block_index() / groups;
  const int64_t channel = (thread_block_index() - image * groups) * Columns + lane;
  const bool inside = channel < args.channels;
  const SlotColumn column{args.partials + image * args.slots_per_image * 2 * args.channels + (inside ? channel : 0),
                          2 * args.channels, args.channels, args.slots_per_image, args.positions};
  parts[thread_index()] = column.mean_part(part);
  sync_thread_block();
  float sum = 0.f;
  RIFORMER_UNROLL
  for (int i = 0; i < kMergeParts; ++i) sum += parts[i * Columns + lane];
  const float shift = sum / static_cast<float>(args.positions);
  float* const more = parts + Columns * kMergeParts;
  more[thread_index()] = column.centred_part(part, shift);
  sync_thread_block();
  if (part != 0 || !inside) return;
  sum = 0.f;
  RIFORMER_UNROLL
  for (int i = 0; i < kMergeParts; ++i) sum += more[i * Columns + lane];
  float* const target = args.moments + image * 2 * args.channels + channel;
  target[0] = *column.mean + shift;
  target[args.channels] = sum;
}

inline void launch_merge(const float* partials, float* moments, int64_t batch, int64_t positions,
                         int64_t slots_per_image, int64_t channels, const Device& device) {
  launch(merge_kernel<kMergeColumns>,
         {"merge", batch * ceil_divide(channels, kMergeColumns), kMergeColumns * kMergeParts,
          2 * kMergeColumns * kMergeParts * 4, 1, device.stream},
         MergeArgs{partials, moments, positions, slots_per_image, channels});
}

// ----------------------------------------------------------------------------------------------- moments of tokens

constexpr int kMomentsThreads = 128, kMomentsPieces = 8;
constexpr int64_t kMomentsTile = int64_t{kSlotRows} * kMomentsPieces * 16;
// An image of so few slots is merged by the thread block that takes its moments.
constexpr int kMostMergedSlots = 4;

struct SlotMomentsArgs {
  const void* x;  // tokens [B, N, C]
  float* target;  // the moments of the slots [slots, 2, C], or with `merged` of the images [B, 2, C]
  int64_t positions, channels, slots_per_image;
  bool merged;
};

// Takes the moments of a slot, or with `merged` of an image of up to four slots, for 128 bytes of its columns. The rows
// are copied to shared memory, from where slot_moments takes them. That is the function that the kernels which write
// tokens call at their end, so the bits are the same. Shared memory: a tile of 64 rows x 8 pieces for each slot, where
// piece p of a row lies at p ^ (row % 8), so that the same piece of eight rows lies in eight different groups of banks;
// behind the tiles the moments of the slots. About 170 instructions per piece of 64 rows: 5 TB/s on 132 multiprocessors
// at 1.7 GHz, so memory is the limit, though by little.
template <class T>
RIFORMER_KERNEL(kMomentsThreads, 4)
slot_moments_kernel(RIFORMER_GRID_CONSTANT SlotMomentsArgs args) {
  constexpr int kColumns = kMomentsPieces * kPerPiece<T>;
  // The rows and columns of this thread block.
  unsigned char* const tiles = shared_memory();
  const int64_t groups = ceil_divide(args.channels, kColumns);
  const int64_t unit = thread_block_index() / groups, column = (thread_block_index() - unit * groups) * kColumns;
  const int64_t left = args.channels - column;
  const int pieces = static_cast<int>((left < kColumns ? left : kColumns) / kPerPiece<T>);
  const int64_t image = args.merged ? unit : unit / args.slots_per_image;
  const int64_t start = args.merged ? 0 : (unit - image * args.slots_per_image) * kSlotRows;
  const int64_t rest = args.positions - start;
  const int slots = args.merged ? static_cast<int>(args.slots_per_image) : 1;
  const int rows = static_cast<int>(rest < slots * kSlotRows ? rest : slots * kSlotRows);
  const T* const source = static_cast<const T*>(args.x) + (image * args.positions + start) * args.channels + column;
  const auto place = [&](int row, int piece) { return tiles + (row * kMomentsPieces + (piece ^ (row % 8))) * 16; };
  // Copy them to shared memory.
  for (int i = thread_index(); i < rows * kMomentsPieces; i += kMomentsThreads) {
    const int row = i / kMomentsPieces, piece = i % kMomentsPieces;
    if (piece < pieces) copy_async_16(place(row, piece), source + row * args.channels + piece * kPerPiece<T>, true);
  }
  copy_async_commit();
  copy_async_wait<0>();
  sync_thread_block();
  // The moments of each slot, and of the image.
  const int warp = thread_index() / kWarp, warps = kMomentsThreads / kWarp;
  float* const target = args.target + unit * 2 * args.channels + column;
  if (!args.merged) {
    slot_moments<T>(place, rows, pieces, warp, warps, target, args.channels);
    return;
  }
  float* const means = reinterpret_cast<float*>(tiles + slots * kMomentsTile);
  for (int slot = 0; slot < slots; ++slot) {
    const int first = slot * kSlotRows;
    slot_moments<T>([&](int row, int piece) { return place(first + row, piece); },
                    rows - first < kSlotRows ? rows - first : kSlotRows, pieces, warp, warps,
                    means + slot * 2 * kColumns, kColumns);
  }
  sync_thread_block();
  const int c = thread_index();
  if (c >= pieces * kPerPiece<T>) return;
  const SlotColumn of{means + c, 2 * kColumns, kColumns, slots, args.positions};
  float sum = 0.f;
  for (int part = 0; part < slots; ++part) sum += of.mean_part(part);
  const float shift = sum / static_cast<float>(args.positions);
  sum = 0.f;
  for (int part = 0; part < slots; ++part) sum += of.centred_part(part, shift);
  target[c] = means[c] + shift;
  target[c + args.channels] = sum;
}

// How many float32 values launch_moments needs in `partials`; 0 where it needs none.
inline int64_t moments_partials_count(int64_t batch, int64_t positions, int64_t channels) {
  return slots_in_image(positions) <= kMostMergedSlots ? 0 : partials_count(batch, positions, channels);
}

template <class T>
void launch_moments_of(const void* x, int64_t batch, int64_t positions, int64_t channels, float* moments,
                       float* partials, const Device& device) {
  const int64_t slots = slots_in_image(positions), groups = ceil_divide(channels, kMomentsPieces * kPerPiece<T>);
  const bool merged = slots > 1 && slots <= kMostMergedSlots;
  const int64_t tiles = merged ? slots : 1, sums = merged ? slots * 2 * kMomentsPieces * kPerPiece<T> * 4 : 0;
  float* const target = slots <= kMostMergedSlots ? moments : partials;
  const int64_t thread_blocks = batch * (merged ? 1 : slots) * groups;
  launch(slot_moments_kernel<T>,
         {"moments", thread_blocks, kMomentsThreads, tiles * kMomentsTile + sums, 1, device.stream},
         SlotMomentsArgs{x, target, positions, channels, slots, merged});
  if (target == partials) launch_merge(partials, moments, batch, positions, slots, channels, device);
}

// Takes the moments [batch, 2, C] of tokens [batch, positions, C] that lie in memory. `partials` has
// moments_partials_count values.
inline void launch_moments(const void* x, DType dtype, int64_t batch, int64_t positions, int64_t channels,
                           float* moments, float* partials, const Device& device) {
  with_served_dtype(dtype, [&](auto element) {
    launch_moments_of<decltype(element)>(x, batch, positions, channels, moments, partials, device);
  });
}

}  // namespace riformer::cuda
