// What all kernels of a block share, whatever their family: the arguments, how rows are divided into slots, and what
// happens to a value before the first product and after the second.
#pragma once

#include "device.h"

namespace riformer::cuda {

// A slot: 64 consecutive rows, which are handed to a warpgroup or a thread block together. There are two ways to divide
// the rows, and N alone decides which (block.cu):
//   slots_per_image > 0: a slot belongs to one image, and the last slot of an image is short. The kernel writes the
//     moments of each slot.
//   slots_per_image = 0: the rows of all images follow each other, and a slot may cross images. No row of a slot is
//     wasted where images have few positions (7 x 7 is 49). The moments are taken by another kernel.
constexpr int kSlotRows = 64;

struct BlockKernelArgs {
  const void* x;            // tokens [rows, C]
  void* out;                // tokens [rows, C]; may be x, as the same threads read a slot before they write it
  const float* maps;        // u, w, P, Q, mu1 (block_maps.h): [B, 5, C] for GroupNorm, [1, 5, C] for LayerNorm
  const float* statistics;  // LayerNorm: RowStatistics of each row, [rows, 4]; null for GroupNorm
  const float* constants;   // fc1's bias [hidden], ls2 [C], ls2 times fc2's bias [C]
  const void* fc1_weight;   // [hidden, C]
  const void* fc2_weight;   // [C, hidden]
  float* partials;          // [slots, 2, C] moments of each slot, or null
  void* hidden_tensor;      // [rows, hidden], written and read by a pair of kernels; unused by a fused one
  int64_t rows;             // B * N
  int64_t positions;        // N
  int64_t slots_per_image;  // 0 where slots cross images
  int channels, hidden;
  bool residual;
};

// The rows of a slot, first to first + rows - 1.
struct Slot {
  int64_t first;
  int rows;
};

RIFORMER_HOST_DEVICE int64_t slot_count(int64_t rows, int64_t positions, int64_t slots_per_image) {
  return slots_per_image ? rows / positions * slots_per_image : (rows + kSlotRows - 1) / kSlotRows;
}

RIFORMER_HOST_DEVICE Slot slot_at(int64_t index, int64_t rows, int64_t positions, int64_t slots_per_image) {
  int64_t first = index * kSlotRows, end = rows;
  if (slots_per_image) {
    const int64_t image = index / slots_per_image;
    first = image * positions + (index - image * slots_per_image) * kSlotRows;
    end = (image + 1) * positions;
  }
  const int64_t left = end - first;
  return {first, static_cast<int>(left < 0 ? 0 : left < kSlotRows ? left : kSlotRows)};
}

// What the norms need of a row. LayerNorm: its own statistics. GroupNorm: the mean of its image; the rest is in the
// maps.
struct RowStatistics {
  float mean, rstd;    // of x
  float mean2, rstd2;  // of y; mean2 is relative to `mean`
};

// y - mean from x: the first half of the block. u and w are zero where the block has no first half.
RIFORMER_DEVICE float first_half(float x, const RowStatistics& row, float u, float w) {
  const float centred = x - row.mean;
  return centred + multiply_add(u, centred * row.rstd, w);
}

// z from x: the input of the first product. GroupNorm: P (x - mean) + Q, as the maps contain all the rest. LayerNorm:
// ((y - mean) - mean2) rstd2 P + Q.
template <bool PerPosition>
RIFORMER_DEVICE float normed(float x, const RowStatistics& row, float u, float w, float p, float q) {
  if (!PerPosition) return multiply_add(x - row.mean, p, q);
  return multiply_add((first_half(x, row, u, w) - row.mean2) * row.rstd2, p, q);
}

// The result of the block from x and a sum of the second product, `branch`: y + ls2 (branch + b2), or without
// `residual` the branch alone. `scale` is ls2 and `shift` is ls2 b2.
RIFORMER_DEVICE float finished(float x, const RowStatistics& row, float u, float w, float branch, float scale,
                               float shift, bool residual) {
  const float scaled = multiply_add(branch, scale, shift);
  if (!residual) return scaled;
  const float centred = x - row.mean;
  return x + (multiply_add(u, centred * row.rstd, w) + scaled);
}

// The statistics of a row. For GroupNorm rstd is 1, because u contains it.
RIFORMER_DEVICE RowStatistics row_statistics(const BlockKernelArgs& args, int64_t row, const float* image_maps) {
  if (args.statistics) {
    const float* s = args.statistics + 4 * row;
    return {s[0], s[1], s[2], s[3]};
  }
  return {image_maps[4 * args.channels], 1.f, 0.f, 1.f};
}

}  // namespace riformer::cuda
