// The stem and the downsampling convolutions: products of the weights with panels that are gathered from the image.
//
// A tap is one of the kernel_height * kernel_width weights of an input channel. A task (tiles.h) goes through these
// phases for each chunk of input channels:
//   1. gather: two channels of the padded image into planes of cells, and from there into the panels
//   2. multiply_panels: W times the panels, added to float32 sums. With the last chunk it adds the bias and stores.
// and at last takes the moments of what was stored.
#pragma once

#include <atomic>

#include "gemm.h"
#include "memory.h"
#include "moments.h"
#include "prefetch.h"
#include "tiles.h"
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

template <class X, class T, class Gemm>
struct EmbedKernel {
  using Element = typename Gemm::Element;
  static constexpr int kTokens = Gemm::kTokens;

  const cpu::EmbedArgs& args;
  int64_t taps;
  Weights<Gemm> weights;
  Tasks tasks;
  int64_t max_rows;  // input rows under one task's positions of one image
  Planes<Gemm> planes;
  const float* bias = nullptr;
  float* partial = nullptr;
  std::atomic<int64_t> missing_bytes{0};  // memory that a task could not get

  // Two taps whose weights are neighbours, and so belong into rows k and k + 1: their first cells, -1 for no tap.
  struct TapPair {
    int64_t first, second;
  };
  const TapPair *pairs = nullptr, *last_pairs = nullptr;  // of two channels; of a single one at the end

  // How many input channels are gathered at once: one panel of their taps fits into the first-level cache.
  static int64_t chunk_of(const cpu::EmbedArgs& args) {
    constexpr int64_t kDepth = 640 / sizeof(Element);
    const int64_t fit = kDepth / (args.kernel_height * args.kernel_width);
    if (fit >= args.in_channels) return args.in_channels;
    return fit >= 16 ? fit / 16 * 16 : (fit >= 2 ? fit / 2 * 2 : 2);
  }

  // Tokens wanted per task; depends on the widths alone, never on the batch.
  static int64_t wanted_tokens(int64_t padded, int64_t rows) {
    const int64_t per_token =
        padded * static_cast<int64_t>(sizeof(Element)) + rows * static_cast<int64_t>(sizeof(float));
    const int64_t fit = task_bytes<Gemm>() / per_token / kTokens * kTokens;
    return fit < kTokens ? kTokens : (fit < kMostTaskTokens ? fit : kMostTaskTokens);
  }

  // The most input rows that `tokens` neighbouring output positions read.
  static int64_t rows_under(const cpu::EmbedArgs& args, int64_t tokens) {
    const int64_t spanned = (tokens + args.out_width - 1) / args.out_width + 1;
    const int64_t out_rows = spanned < args.out_height ? spanned : args.out_height;
    return (out_rows - 1) * args.stride + args.kernel_height;
  }

  EmbedKernel(const cpu::EmbedArgs& args_)
      : args(args_),
        taps(args.kernel_height * args.kernel_width),
        weights{args.weight, args.channels, args.in_channels, taps, chunk_of(args), args.weight_channels_last},
        tasks(Tiles(args.batch, args.out_height * args.out_width),
              wanted_tokens(weights.padded_depth(0), weights.padded_rows()), args.pool.threads),
        max_rows(rows_under(args, tasks.max_tokens())),
        planes(args, max_rows) {}

  // One vector of a panel and where it is gathered from. Both offsets are the same for all taps: `from` is relative to
  // a tap's first cell, `to` to a row of the first panel.
  struct VectorCopy {
    int64_t from, to;
    int length;
  };

  struct Memory {
    Element *panels, *row, *cells;
    float* sums;
    Span* spans;
    VectorCopy* copies;
    int64_t bytes;
  };
  // Rows of a panel, which are written two at a time.
  int64_t panel_depth(int64_t first) const { return round_up(weights.padded_depth(first), 2); }

  Memory memory(void* base) const {
    Arena arena{static_cast<char*>(base)};
    const int64_t tokens = tasks.max_tokens(), panels = (tokens + kTokens - 1) / kTokens;
    Memory m;
    m.panels = arena.take<Element>(panels * panel_depth(0) * kTokens);
    m.row = arena.take<Element>(planes.row_elements());
    m.cells = arena.take<Element>(planes.cell_elements());
    m.sums = arena.take<float>(panels * weights.padded_rows() * kTokens);
    m.spans = arena.take<Span>(max_spans(tasks, kTokens));
    // A vector ends early at the end of a panel, of an image or of an output row.
    m.copies =
        arena.take<VectorCopy>(2 * max_spans(tasks, kTokens) + tokens / Vec::kLanes + tokens / args.out_width + 2);
    m.bytes = arena.used;
    return m;
  }

  // Cuts the spans [first, last) of one image at the ends of output rows and into vectors.
  VectorCopy* plan_copies(const Span* first, const Span* last, int64_t depth, VectorCopy* copies) const {
    const int64_t first_row = first->position / args.out_width;
    Element* const origin = nullptr;
    for (const Span* span = first; span < last; ++span) {
      int64_t row = span->position / args.out_width, column = span->position % args.out_width;
      for (int done = 0; done < span->length;) {
        const int64_t room = args.out_width - column, left = span->length - done;
        const int64_t fit = room < left ? room : left;
        const int length = static_cast<int>(fit < Vec::kLanes ? fit : Vec::kLanes);
        *copies++ = {(row - first_row) * args.stride * planes.row_size + column * Gemm::kCell,
                     Gemm::at(origin, span->panel * depth, span->token + done) - origin, length};
        done += length;
        column += length;
        if (column == args.out_width) {
          column = 0;
          ++row;
        }
      }
    }
    return copies;
  }

  // Fills the panels with the chunk of input channels from `begin` on, under the spans [first, last) of one image.
  void gather(const Span* first, const Span* last, int64_t begin, const Memory& m) const {
    const int64_t end = begin + weights.chunk_channels(begin), depth = panel_depth(begin);
    const int64_t stop = last[-1].position + last[-1].length;
    const int64_t first_row = first->position / args.out_width, last_row = (stop - 1) / args.out_width;
    const int64_t input_rows = (last_row - first_row) * args.stride + args.kernel_height;
    const VectorCopy* copies_end = plan_copies(first, last, depth, m.copies);
    planes.clear(m.row, m.cells);
    for (int64_t channel = begin; channel < end; channel += 2) {
      const int64_t channels = channel + 1 < end ? 2 : 1;
      planes.template fill<X>(first->image, channel, channels, first_row * args.stride, input_rows, m.row, m.cells);
      const TapPair* table = channels == 2 ? pairs : last_pairs;
      const int64_t count = args.weight_channels_last ? taps : (channels * taps + 1) / 2;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t k =
            args.weight_channels_last ? t * (end - begin) + channel - begin : (channel - begin) * taps + 2 * t;
        const Element* one = m.cells + table[t].first;
        Element* to = Gemm::at(m.panels, k, 0);
        if (table[t].second >= 0)
          copy_vectors<true>(m.copies, copies_end, one, m.cells + table[t].second, to);
        else
          copy_vectors<false>(m.copies, copies_end, one, nullptr, to);
      }
    }
  }
  template <bool kSecond>
  static void copy_vectors(const VectorCopy* copy, const VectorCopy* end, const Element* first, const Element* second,
                           Element* to) {
    for (; copy < end; ++copy)
      Gemm::template copy<kSecond>(to + copy->to, first + copy->from, second + copy->from, copy->length);
  }

  // Channel c of one panel: adds the bias and stores.
  void finish(const Span* first, const Span* last, int64_t c, const float* panel_sums) const {
    const Vec shift = Vec::broadcast(bias[c]);
    for (const Span* span = first; span < last; ++span) {
      const float* sums = panel_sums + c * kTokens + span->token;
      T* out = static_cast<T*>(args.out) + (span->image * args.channels + c) * tasks.tiles.positions + span->position;
      for_each_vector(span->length,
                      [&](int64_t j, auto lanes) { store(load(sums + j, lanes) + shift, out + j, lanes); });
    }
  }

  // Adds the products with the chunk of input channels from `begin` on, for all panels.
  void multiply_panels(int64_t begin, const Panels& cut, const Span* spans_end, const Memory& m) const {
    const bool final = begin + weights.chunk_channels(begin) >= args.in_channels;
    const WeightRows<Gemm> rows = weights.at(begin);
    const Span* first = m.spans;
    for (int64_t p = 0; p < cut.count; ++p) {
      const int vectors = vectors_in(cut, p);
      float* sums = m.sums + p * weights.padded_rows() * kTokens;
      const Span* last = first;
      while (last < spans_end && last->panel == p) ++last;
      for (int64_t row = 0; row < args.channels; row += Gemm::kRows) {
        if (p == 0) prefetch_rows(rows, row + Gemm::kRows, args.channels, weights.depth(begin));
        multiply<Gemm>(vectors, rows.data + row * rows.stride, rows.stride, m.panels + p * panel_depth(begin) * kTokens,
                       weights.padded_depth(begin), sums + row * kTokens, begin > 0);
        for (int64_t c = row; final && c < row + Gemm::kRows && c < args.channels; ++c) finish(first, last, c, sums);
      }
      first = last;
    }
  }

  void run_task(int64_t task) {
    const int64_t first = tasks.first(task), last = tasks.first(task + 1);
    if (first == last) return;
    const int64_t bytes = memory(nullptr).bytes;
    void* base = cpu::thread_scratch(bytes);
    if (!base) {
      missing_bytes.store(bytes);
      return;
    }
    const Memory m = memory(base);
    const Panels cut = panels_of<Gemm>(tokens_of(tasks.tiles, first, last));
    const int spans = cut_spans(tasks.tiles, first, last, cut, m.spans);
    for (int64_t begin = 0; begin < args.in_channels; begin += weights.chunk) {
      clear_padding<Gemm>(m.panels, cut, round_up(weights.depth(begin), 2), panel_depth(begin));
      for (int i = 0, first_span = 0; i < spans; ++i) {
        if (i + 1 < spans && m.spans[i + 1].image == m.spans[i].image) continue;
        gather(m.spans + first_span, m.spans + i + 1, begin, m);
        first_span = i + 1;
      }
      multiply_panels(begin, cut, m.spans + spans, m);
    }
    if (args.moments_out)
      moments_of_tiles(static_cast<const T*>(args.out), tasks.tiles, first, last, args.channels, 0, args.channels,
                       partial);
  }

  static void run_tasks(int64_t begin, int64_t end, void* context) {
    Gemm::begin();
    for (int64_t task = begin; task < end; ++task) static_cast<EmbedKernel*>(context)->run_task(task);
    Gemm::end();
  }

  // The first cell of tap t among the taps of `channels` channels, -1 behind the last tap.
  int64_t tap_cell(int64_t t, int64_t channels, bool first) const {
    if (t >= channels * taps) return -1;
    const int64_t tap = t % taps;
    return planes.tap(t / taps, tap / args.kernel_width, tap % args.kernel_width, first);
  }
  void make_pairs(int64_t channels, TapPair* table) const {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t one = args.weight_channels_last ? t : 2 * t,
                    other = args.weight_channels_last ? t + taps : 2 * t + 1;
      table[t] = {tap_cell(one, channels, true), tap_cell(other, channels, false)};
    }
  }

  int64_t run() {
    Arena arena{nullptr};
    TapPair *even, *odd;
    float* shift;
    Element* copy;
    const auto take = [&] {
      even = arena.take<TapPair>(taps);
      odd = arena.take<TapPair>(taps);
      shift = arena.take<float>(args.channels);
      partial = arena.take<float>(args.moments_out ? tasks.tiles.count() * 2 * args.channels : 0);
      copy = arena.take<Element>(weights.copy_elements());
    };
    take();
    const int64_t bytes = arena.used;
    const Buffer buffer(bytes);
    if (!buffer.data) return bytes;
    arena = {static_cast<char*>(buffer.data)};
    take();
    weights.prepare(args.pool, copy);
    make_pairs(2, even);
    make_pairs(1, odd);
    pairs = even;
    last_pairs = odd;
    read_all(args.bias, args.channels, 0, shift);
    bias = shift;
    args.pool.run(tasks.count, &run_tasks, this);
    if (missing_bytes.load() == 0 && args.moments_out)
      merge_all(args.pool, partial, tasks.tiles, args.channels, args.moments_out);
    return missing_bytes.load();
  }
};

inline int64_t embed(const cpu::EmbedArgs& args) {
  return with_dtypes(args.x_dtype, args.dtype, [&](auto x, auto out) {
    using T = decltype(out);
    return EmbedKernel<decltype(x), T, typename GemmFor<T>::Type>(args).run();
  });
}

}  // namespace riformer::RIFORMER_ISA
