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
#include "planes.h"
#include "rests.h"
#include "tiles.h"
#include "weights.h"

namespace riformer::RIFORMER_ISA {

template <class X, class T, class Gemm>
struct SplitEmbed;

template <class X, class T, class Gemm>
struct EmbedKernel {
  using Element = typename Gemm::Element;
  static constexpr int kTokens = Gemm::kTokens;

  const cpu::EmbedArgs& args;
  int64_t taps;
  Weights<Gemm> weights;
  bool split;  // whether the threads share the channels (embed_split.h)
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
    return task_tokens(task_bytes<Gemm>() / per_token / kTokens * kTokens);
  }

  // The most tokens whose panels the threads share (embed_split.h). With the 49 of a 224 px image the convolution to
  // 512 channels takes 11 % less time then; with the 196 of the one before it takes 8 % more, as the panels pass from
  // one core's cache to the other's.
  static constexpr int64_t kMostShared = 100;

  int64_t chunks() const { return (args.in_channels + weights.chunk - 1) / weights.chunk; }
  Tiles tiles() const { return Tiles(args.batch, args.out_height * args.out_width); }
  // The tasks if the threads share the tokens.
  Tasks tasks_of_threads() const {
    return Tasks(tiles(), wanted_tokens(weights.padded_depth(0), weights.padded_rows()), args.pool.threads);
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
        split(chunks() >= args.pool.threads && few_tokens(tasks_of_threads(), args.pool.threads, kMostShared)),
        tasks(split ? Tasks(tiles(), args.batch * tiles().positions, 1) : tasks_of_threads()),
        max_rows(rows_under(args, tasks.max_tokens())),
        planes(args, max_rows) {}

  // One vector of a panel and where it is gathered from. Both offsets are the same for all taps: `from` is relative to
  // a tap's first cell, `to` to a row of the first panel.
  struct VectorCopy {
    int64_t from, to;
    int length;
  };

  struct Memory {
    Element* panels;  // of one chunk of input channels
    Element* rests;   // the panels of rests again, token by token
    Element *row, *cells;
    float* sums;
    Span* spans;
    VectorCopy* copies;
    int64_t bytes;
  };
  // Rows of a panel, which are written two at a time.
  int64_t panel_depth(int64_t first) const { return round_up(weights.padded_depth(first), 2); }

  // Of a task, for one chunk of input channels.
  int64_t panels() const { return max_panels(tasks, kTokens, Gemm::kMostRest); }
  int64_t panel_elements() const { return panels() * panel_depth(0) * kTokens; }
  int64_t rest_elements() const { return max_rest_panels(tasks, kTokens, Gemm::kMostRest) * panel_depth(0) * kTokens; }
  int64_t sum_floats() const { return panels() * weights.padded_rows() * kTokens; }

  Memory memory(void* base) const {
    Arena arena{static_cast<char*>(base)};
    const int64_t tokens = tasks.max_tokens();
    Memory m;
    m.panels = arena.take<Element>(panel_elements());
    m.rests = arena.take<Element>(rest_elements());
    m.row = arena.take<Element>(planes.row_elements());
    m.cells = arena.take<Element>(planes.cell_elements());
    m.sums = arena.take<float>(sum_floats());
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
  void finish(const Span* first, const Span* last, int64_t c, const float* channel_sums) const {
    const Vec shift = Vec::broadcast(bias[c]);
    for (const Span* span = first; span < last; ++span) {
      const float* sums = channel_sums + span->token;
      T* out = static_cast<T*>(args.out) + (span->image * args.channels + c) * tasks.tiles.positions + span->position;
      for_each_vector(span->length,
                      [&](int64_t j, auto lanes) { store(load(sums + j, lanes) + shift, out + j, lanes); });
    }
  }

  // The panels of a task with the chunk of input channels from `begin` on.
  void gather_panels(int64_t begin, const Panels& cut, int spans, const Memory& m) const {
    const int64_t depth = panel_depth(begin);
    clear_padding<Gemm>(m.panels, cut, round_up(weights.depth(begin), 2), depth);
    for (int i = 0, first = 0; i < spans; ++i) {
      if (i + 1 < spans && m.spans[i + 1].image == m.spans[i].image) continue;
      gather(m.spans + first, m.spans + i + 1, begin, m);
      first = i + 1;
    }
    if constexpr (Gemm::kMostRest > 0)
      for (int64_t p = cut.whole; p < cut.count; ++p)
        turn_panel<Gemm>(m.panels + p * depth * kTokens, 0, weights.depth(begin), cut.length(p), depth,
                         m.rests + (p - cut.whole) * depth * kTokens);
  }

  // Adds the products with the chunk of input channels from `begin` on, for the channels [row_begin, row_end) and all
  // panels. After the last chunk the channels are finished.
  void multiply_panels(int64_t begin, int64_t row_begin, int64_t row_end, const Panels& cut, const Span* spans_end,
                       const Memory& m) const {
    const bool final = begin + weights.chunk_channels(begin) >= args.in_channels;
    const WeightRows<Gemm> rows = weights.at(begin);
    const int64_t depth = panel_depth(begin);
    const Span* first = m.spans;
    for (int64_t p = 0; p < cut.count; ++p) {
      float* sums = m.sums + p * weights.padded_rows() * kTokens;
      const Span* last = first;
      while (last < spans_end && last->panel == p) ++last;
      if (cut.is_rest(p)) {
        multiply_rest_panel(begin, row_begin, row_end, cut, p, first, final ? last : first, m);
        first = last;
        continue;
      }
      const int vectors = vectors_in(cut, p);
      for (int64_t row = row_begin; row < row_end; row += Gemm::kRows) {
        multiply<Gemm>(vectors, rows.data + row * rows.stride, rows.stride, m.panels + p * depth * kTokens,
                       weights.padded_depth(begin), sums + row * kTokens, begin > 0,
                       p == 0 && row + Gemm::kRows < row_end);
        for (int64_t c = row; final && c < row + Gemm::kRows && c < row_end; ++c)
          finish(first, last, c, sums + c * kTokens);
      }
      first = last;
    }
  }

  // multiply_panels for one panel of rests. [first, last) are the spans to be finished.
  void multiply_rest_panel(int64_t begin, int64_t row_begin, int64_t row_end, const Panels& cut, int64_t panel,
                           const Span* first, const Span* last, const Memory& m) const {
    if constexpr (Gemm::kMostRest > 0) {
      const WeightRows<Gemm> rows = weights.at(begin);
      const int64_t pitch = panel_depth(begin), sum_pitch = weights.padded_rows();
      const Element* rests = m.rests + (panel - cut.whole) * pitch * kTokens;
      float* sums = m.sums + panel * sum_pitch * kTokens;
      alignas(64) float finished[Vec::kLanes * kTokens];
      for (int64_t row = row_begin; row < row_end; row += Vec::kLanes) {
        const int count = static_cast<int>(row_end - row < Vec::kLanes ? row_end - row : Vec::kLanes);
        const auto use = [&](int64_t token, Vec sum) {
          float* to = sums + token * sum_pitch + row;
          if (begin > 0) sum = Vec::load_n(to, count) + sum;
          sum.store_n(to, count);
          for (int i = 0; first < last && i < count; ++i) finished[i * kTokens + token] = to[i];
        };
        multiply_rests<Gemm>(rows.data + row * rows.stride, rows.stride, count, rests, pitch, cut.length(panel),
                             weights.depth(begin), use);
        for (int i = 0; first < last && i < count; ++i) finish(first, last, row + i, finished + i * kTokens);
      }
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
    const Panels cut = panels_of<Gemm>(tasks.tiles, first, last);
    const int spans = cut_spans(cut, m.spans);
    for (int64_t begin = 0; begin < args.in_channels; begin += weights.chunk) {
      gather_panels(begin, cut, spans, m);
      multiply_panels(begin, 0, args.channels, cut, m.spans + spans, m);
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
    if (split)
      SplitEmbed<X, T, Gemm>(*this).run();
    else
      args.pool.run(tasks.count, &run_tasks, this);
    if (missing_bytes.load() == 0 && args.moments_out)
      merge_all(args.pool, partial, tasks.tiles, args.channels, args.moments_out);
    return missing_bytes.load();
  }
};

}  // namespace riformer::RIFORMER_ISA

#include "embed_split.h"

namespace riformer::RIFORMER_ISA {

inline int64_t embed(const cpu::EmbedArgs& args) {
  return with_dtypes(args.x_dtype, args.dtype, [&](auto x, auto out) {
    using T = decltype(out);
    return EmbedKernel<decltype(x), T, typename GemmFor<T>::Type>(args).run();
  });
}

}  // namespace riformer::RIFORMER_ISA
