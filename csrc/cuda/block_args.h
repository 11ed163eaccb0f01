// What the matrix kernels of a block share: their arguments, how rows are divided, and what happens to a row before the
// first product and after the second.
#pragma once

#include "device.h"

namespace riformer::cuda {

// Rows are handed out in slots of 64. With `slots_per_image` a slot belongs to one image (the last of an image is
// short) and its moments are written; with 0 the rows of all images follow each other, which wastes none where images
// have few positions (7 x 7 is 49), and the moments are taken in a pass of their own. Which of the two depends on N
// alone.
constexpr int kSlotRows = 64;

struct BlockKernelArgs {
  const void* x;            // tokens [rows, C]
  void* out;                // tokens [rows, C]; may be x: a slot is read before it is written, by the same threads
  const float* maps;        // [B, 5, C]: u, w, P, Q and mu1 in every place; [1, 5, C] with statistics (block_maps.h)
  const float* statistics;  // [rows, 4]: mean and rstd of x, mean of y relative to it, rstd of y; null for GroupNorm
  const float* constants;   // fc1's bias [hidden], ls2 [C], ls2 times fc2's bias [C]
  const void* fc1_weight;   // [hidden, C]
  const void* fc2_weight;   // [C, hidden]
  float* partials;          // [slots, 2, C] moments of each slot, or null
  void* between;            // [rows, hidden]: the hidden tensor of the two-kernel form, or null
  int64_t rows;             // B * N
  int64_t positions;        // N
  int64_t slots_per_image;  // or 0
  int channels, hidden;
  bool residual;
};

// The rows of a slot.
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

// Per-row numbers. GroupNorm: those of the row's image (rstds are in the maps). LayerNorm: of the row.
struct RowStatistics {
  float mean, rstd, mean2, rstd2;
};

// y - mean, from x: the first half of the block (u and w are zero where it is left out).
RIFORMER_DEVICE float first_half(float x, const RowStatistics& row, float u, float w) {
  const float centred = x - row.mean;
  return centred + multiply_add(u, centred * row.rstd, w);
}

// z = P xc + Q for GroupNorm (mean2 is in Q, u in P); for LayerNorm ((y - mean) - mean2) rstd2 P + Q.
template <bool PerPosition>
RIFORMER_DEVICE float normed(float x, const RowStatistics& row, float u, float w, float p, float q) {
  if (!PerPosition) return multiply_add(x - row.mean, p, q);
  return multiply_add((first_half(x, row, u, w) - row.mean2) * row.rstd2, p, q);
}

// y + ls2 branch + ls2 b2, or the branch alone.
RIFORMER_DEVICE float finished(float x, const RowStatistics& row, float u, float w, float branch, float scale,
                               float shift, bool residual) {
  const float scaled = multiply_add(branch, scale, shift);
  if (!residual) return scaled;
  const float centred = x - row.mean;
  return x + (multiply_add(u, centred * row.rstd, w) + scaled);
}

// The numbers of a row; for GroupNorm rstd is 1, as u holds it.
RIFORMER_DEVICE RowStatistics row_statistics(const BlockKernelArgs& args, int64_t row, const float* image_maps) {
  if (args.statistics) {
    const float* s = args.statistics + 4 * row;
    return {s[0], s[1], s[2], s[3]};
  }
  return {image_maps[4 * args.channels], 1.f, 0.f, 1.f};
}

}  // namespace riformer::cuda
