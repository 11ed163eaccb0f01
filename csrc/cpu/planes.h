// The input of a convolution as its panels are gathered from it.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "prefetch.h"
#include "weights.h"

namespace riformer::RIFORMER_ISA {

// The padded input rows under a task, for two input channels. They are split into `stride` planes of cells by column
// modulo the stride, so that neighbouring output columns read neighbouring cells. What cell j of a plane holds, with e
// the elements of the padded row:
//   float32, one channel            e[stride j + plane]
//   bfloat16, pairs of columns      e[stride j + plane - 1] and e[stride j + plane] of one channel. For weights in the
//                                   order of the parameter: most pairs of taps are neighbours in a row.
//   bfloat16, pairs of channels     e[stride j + plane] of both channels. For channels_last weights.
// With a stride of 2, pairs of columns need no planes: the padded row itself is both of them, one element apart
// (whole_rows).
template <class Gemm>
struct Planes {
  using Element = typename Gemm::Element;
  static constexpr int kCell = Gemm::kCell;

  const cpu::EmbedArgs& args;
  bool channel_pairs, whole_rows;
  int64_t columns, padded_width;
  int64_t plane_size, row_size, channel_size;  // elements

  Planes(const cpu::EmbedArgs& args_, int64_t rows)
      : args(args_),
        channel_pairs(kCell == 2 && args.weight_channels_last),
        whole_rows(kCell == 2 && !channel_pairs && args.stride == 2),
        columns(round_up(args.out_width + args.kernel_width / args.stride, 16)),
        padded_width(round_up(args.stride * (columns + 1), 32)),
        plane_size(whole_rows ? 1 : columns * kCell),
        row_size(whole_rows ? padded_width : args.stride * plane_size),
        channel_size(rows * row_size) {}

  int64_t cell_elements() const { return 2 * channel_size + 64; }  // a vector that starts in a row may end behind it
  int64_t row_elements() const { return 2 * padded_width + 64; }

  // The first cell of a tap, in elements: the cell that output row 0 and column 0 reads. `channel` is 0 or 1; `first`
  // says whether the tap is the first or the second of a pair.
  int64_t tap(int64_t channel, int64_t ky, int64_t kx, bool first) const {
    const int64_t at = kCell == 2 && !channel_pairs && first ? kx + 1 : kx;
    return (channel_pairs ? 0 : channel) * channel_size + ky * row_size + at % args.stride * plane_size +
           at / args.stride * kCell;
  }

  // Sets to zero what lies around the image; `fill` writes the image only.
  void clear(Element* row, Element* cells) const {
    std::memset(static_cast<void*>(row), 0, static_cast<size_t>(row_elements()) * sizeof(Element));
    if (whole_rows) std::memset(static_cast<void*>(cells), 0, static_cast<size_t>(cell_elements()) * sizeof(Element));
  }

  // Makes the cells of padded input rows [first, first + count) of `channels` channels (1 or 2) from `channel` on.
  // `row` is working memory.
  template <class X>
  void fill(int64_t image, int64_t channel, int64_t channels, int64_t first, int64_t count, Element* row,
            Element* cells) const {
    const X* plane = static_cast<const X*>(args.x) + image * args.stride_batch + channel * args.stride_channel;
    const int64_t left = args.padding + (kCell == 2 ? 1 : 0), room = padded_width - left;
    const int64_t width = args.width < room ? args.width : room;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t y = first + r - args.padding;
      Element* to = cells + r * row_size;
      if (y < 0 || y >= args.height) {
        for (int64_t slot = 0; slot < channels; ++slot)
          std::memset(static_cast<void*>(to + slot * channel_size), 0, static_cast<size_t>(row_size) * sizeof(Element));
        continue;
      }
      if (args.stride_column == 1) prefetch_next(plane, channel, channels, y, count);
      for (int64_t slot = 0; slot < channels; ++slot)
        copy_strided(plane + slot * args.stride_channel + y * args.stride_row, width,
                     (whole_rows ? to + slot * channel_size : row + slot * padded_width) + left);
      if (whole_rows) continue;
      if (channel_pairs) {
        interleave(row + 1, to);
        continue;
      }
      for (int64_t slot = 0; slot < channels; ++slot)
        for (int64_t p = 0; p < args.stride; ++p)
          Gemm::take_every(row + slot * padded_width + p, args.stride, columns,
                           to + slot * channel_size + p * plane_size);
    }
  }

  // Prefetches row y of the next two channels or, behind the last channel, the row that the next task begins with.
  template <class X>
  void prefetch_next(const X* plane, int64_t channel, int64_t channels, int64_t y, int64_t count) const {
    const int64_t left = args.in_channels - channel - channels;
    const X* next = left > 0 ? plane + channels * args.stride_channel : plane - channel * args.stride_channel;
    const int64_t row = left > 0 ? y : y + count, most = left > 0 ? left : args.in_channels;
    if (row >= args.height) return;
    for (int64_t slot = 0; slot < 2 && slot < most; ++slot) {
      const X* from = next + slot * args.stride_channel + row * args.stride_row;
      prefetch(from, args.width * static_cast<int64_t>(sizeof(X)));
    }
  }

  // `width` columns of one input row, converted to the product's element type.
  template <class X>
  void copy_strided(const X* from, int64_t width, Element* to) const {
    if (args.stride_column == 1)
      copy_row(from, width, to);
    else
      for (int64_t j = 0; j < width; ++j) narrow(widen(from[j * args.stride_column]), to[j]);
  }

  // The cells of one row from the padded rows of two channels.
  void interleave(const Element* row, Element* to) const {
    for (int64_t p = 0; p < args.stride; ++p)
      for (int64_t j = 0; j < columns; ++j) {
        Element* cell = to + p * plane_size + 2 * j;
        cell[0] = row[args.stride * j + p];
        cell[1] = row[args.stride * j + p + padded_width];
      }
  }
};

}  // namespace riformer::RIFORMER_ISA
