// One RIFormer block in one pass: x is read, out is written, and the hidden tensor stays in the caches of a core.
//
//     y = x + ls1 * norm1(x)        out = y + ls2 * (W2 gelu(W1 z + b1) + b2),   z = norm2(y)
//
// A task (tiles.h) goes through these phases:
//   1. normalise: z into panels of the product's element type. With GroupNorm, z is one affine map of x per image and
//      channel (norm_map.h).
//   2. for each chunk of hidden channels and each panel: first_product (W1, bias, GELU), then second_product (W2, added
//      to float32 sums).
//   3. with the last chunk: finish adds the bias, the layer scale and the residual, and stores.
//   4. the moments of what was stored, for the next block.
#pragma once

#include <atomic>

#include "gemm.h"
#include "memory.h"
#include "moments.h"
#include "norm_map.h"
#include "prefetch.h"
#include "rests.h"
#include "tiles.h"
#include "weights.h"

namespace riformer::RIFORMER_ISA {

// The sizes of a task. They depend on the widths alone, never on the batch.
struct BlockChoice {
  int64_t tokens;        // wanted per task
  int64_t hidden_chunk;  // hidden channels per chunk: one panel of them fits into the first-level cache
};

template <class Gemm>
inline BlockChoice choose_block(int64_t channels, int64_t hidden, bool per_position) {
  const int64_t element = sizeof(typename Gemm::Element);
  const int64_t fit = 512 / element;  // in the hidden chunk
  const int64_t per_token = channels * (element + 4 + (per_position ? 4 : 0));
  const int64_t tokens = task_bytes<Gemm>() / per_token / Gemm::kTokens * Gemm::kTokens;
  return {task_tokens(tokens), hidden < fit ? hidden : fit};
}

template <class T, class Gemm>
struct BlockRests;
template <class T, class Gemm>
struct SplitBlock;

template <class T, class Gemm>
struct BlockKernel {
  using Element = typename Gemm::Element;
  static constexpr int kTokens = Gemm::kTokens;

  const cpu::BlockArgs& args;
  BlockChoice choice;
  Weights<Gemm> fc1, fc2;
  Tasks tasks;
  int64_t depth1, depth2;  // rows of a panel of z and of the hidden chunk, padded for the product
  int64_t rows2;           // channels, padded for the second product
  int64_t panels;          // of the largest task
  const float *fc1_bias, *fc2_bias, *layer_scale_2;
  float* maps;     // the ImageMap of every image; with per_position four rows [channels], see fill_position_maps
  float* partial;  // the moments of every tile
  std::atomic<int64_t> missing_bytes{0};  // memory that a task could not get
  bool split;                             // whether the threads share the channels (block_split.h)

  BlockKernel(const cpu::BlockArgs& args_)
      : args(args_),
        choice(choose_block<Gemm>(args.channels, args.hidden, args.per_position)),
        fc1{args.fc1_weight, args.hidden, args.channels, 1, args.channels, false},
        fc2{args.fc2_weight, args.channels, args.hidden, 1, choice.hidden_chunk, false},
        tasks(Tiles(args.batch, args.positions), choice.tokens, args.pool.threads) {
    depth1 = fc1.padded_depth(0);
    depth2 = fc2.padded_depth(0);
    rows2 = fc2.padded_rows();
    split = !args.per_position && few_tokens(tasks, args.pool.threads);
    if (split) tasks = Tasks(tasks.tiles, args.batch * args.positions, 1);
    panels = max_panels(tasks, kTokens, Gemm::kMostRest);
  }

  struct Memory {
    Element* z;       // the panels of the task
    Element* rests;   // z of the rests again, token by token
    Element* hidden;  // one panel of one chunk; with `split` all panels of all chunks
    float* sums;      // of the second product, for all panels
    float* rows;      // the result of one call of the first product, or of the second for rests
    float* y;         // with per_position, y for all panels
    Span* spans;
    int64_t bytes;
  };

  int64_t rest_elements() const { return max_rest_panels(tasks, kTokens, Gemm::kMostRest) * kTokens * depth1; }
  static constexpr int64_t row_floats() { return (Gemm::kRows > Vec::kLanes ? Gemm::kRows : Vec::kLanes) * kTokens; }

  Memory memory(void* base) const {
    Arena arena{static_cast<char*>(base)};
    Memory m;
    m.z = arena.take<Element>(panels * depth1 * kTokens);
    m.rests = arena.take<Element>(rest_elements());
    m.hidden = arena.take<Element>(depth2 * kTokens);
    m.sums = arena.take<float>(panels * rows2 * kTokens);
    m.rows = arena.take<float>(row_floats());
    m.y = arena.take<float>(args.per_position ? panels * args.channels * kTokens : 0);
    m.spans = arena.take<Span>(max_spans(tasks, kTokens));
    m.bytes = arena.used;
    return m;
  }

  const T* x_row(const Span& span, int64_t c) const {
    return static_cast<const T*>(args.x) + (span.image * args.channels + c) * args.positions + span.position;
  }
  T* out_row(const Span& span, int64_t c) const {
    return static_cast<T*>(args.out) + (span.image * args.channels + c) * args.positions + span.position;
  }

  // z for channels [begin, end), with GroupNorm. Goes through the whole task for two channels before the next two, so
  // that long rows of x are read: span by span, a third of the time at C = 64 was spent waiting for rows (6 KB apart).
  void normalise(const Panels& cut, int spans, int64_t begin, int64_t end, const Memory& m) const {
    for (int64_t c = begin; c < end; c += 2)
      for (const Span* span = m.spans; span < m.spans + spans; ++span) {
        const ImageMap map(maps, span->image, args.channels);
        Element* panel = m.z + span->panel * depth1 * kTokens;
        const T *a = x_row(*span, c), *b = x_row(*span, c + 1);
        const Vec centre = Vec::broadcast(*map.centre);
        const Vec scale_a = Vec::broadcast(map.z_scale[c]), shift_a = Vec::broadcast(map.z_shift[c]);
        const Vec scale_b = Vec::broadcast(map.z_scale[c + 1]), shift_b = Vec::broadcast(map.z_shift[c + 1]);
        for_each_vector(span->length, [&](int64_t j, auto lanes) {
          const Vec za = fma(scale_a, load(a + j, lanes) - centre, shift_a);
          const Vec zb = fma(scale_b, load(b + j, lanes) - centre, shift_b);
          Gemm::put(panel, c, span->token + j, za, zb, lanes);
        });
      }
    turn_rests(cut, begin, end, m);
  }

  // Channels [begin, end) of the rests' z, from panels to token by token.
  void turn_rests(const Panels& cut, int64_t begin, int64_t end, const Memory& m) const {
    if constexpr (Gemm::kMostRest > 0)
      for (int64_t p = cut.whole; p < cut.count; ++p)
        turn_panel<Gemm>(m.z + p * depth1 * kTokens, begin, end, cut.length(p), depth1,
                         m.rests + (p - cut.whole) * depth1 * kTokens);
  }

  // y of n positions of a span, from position j on, with LayerNorm: to rows kTokens apart, and its statistics. It is
  // kept in float32, as its statistics are known only after it.
  void position_rows(const Span& span, int j, int n, float* y, Vec* mean, Vec* rstd) const {
    const int64_t channels = args.channels;
    const float *weight1 = maps, *bias1 = maps + channels;
    if (args.norm1_weight.data) {
      position_statistics(
          channels, args.eps1, [&](int64_t c) { return Vec::load_n(x_row(span, c) + j, n); }, mean, rstd);
      for (int64_t c = 0; c < channels; ++c) {
        const Vec x = Vec::load_n(x_row(span, c) + j, n);
        const Vec normed = fma((x - *mean) * *rstd, Vec::broadcast(weight1[c]), Vec::broadcast(bias1[c]));
        (x + normed).store_n(y + c * kTokens + j, n);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) Vec::load_n(x_row(span, c) + j, n).store_n(y + c * kTokens + j, n);
    }
    position_statistics(
        channels, args.eps2, [&](int64_t c) { return Vec::load_n(y + c * kTokens + j, n); }, mean, rstd);
  }

  // z of one span with LayerNorm. y is kept for the residual.
  void normalise_positions(const Span& span, const Memory& m) const {
    const int64_t channels = args.channels;
    const float *weight2 = maps + 2 * channels, *bias2 = weight2 + channels;
    Element* panel = m.z + span.panel * depth1 * kTokens;
    float* y = m.y + span.panel * channels * kTokens + span.token;
    for (int j = 0; j < span.length; j += Vec::kLanes) {
      const int n = span.length - j;
      Vec mean, rstd;
      position_rows(span, j, n, y, &mean, &rstd);
      for (int64_t c = 0; c < channels; c += 2) {
        const Vec a = (Vec::load_n(y + c * kTokens + j, n) - mean) * rstd;
        const Vec b = (Vec::load_n(y + (c + 1) * kTokens + j, n) - mean) * rstd;
        Gemm::put(panel, c, span.token + j, fma(a, Vec::broadcast(weight2[c]), Vec::broadcast(bias2[c])),
                  fma(b, Vec::broadcast(weight2[c + 1]), Vec::broadcast(bias2[c + 1])), n);
      }
    }
  }

  // Prefetches the x of the next task, which starts at `tile`, while this task of `tokens` tokens multiplies.
  // `first_product` steps once per call of `multiply`.
  RowPrefetcher prefetcher_of_x(int64_t tile, int64_t tokens) const {
    RowPrefetcher next_x;
    if (tile >= tasks.tiles.count() || args.per_position) return next_x;
    const int64_t start = tasks.tiles.start(tile), left = args.positions - start;
    const int64_t size = sizeof(T);
    next_x.row =
        static_cast<const char*>(args.x) + (tasks.tiles.image(tile) * args.channels * args.positions + start) * size;
    next_x.pitch = args.positions * size;
    next_x.bytes = (tokens < left ? tokens : left) * size;
    next_x.rows = args.channels;
    const int64_t steps = (args.hidden / Gemm::kRows + 1) * ((tokens + kTokens - 1) / kTokens);
    const int64_t lines = (next_x.bytes + kCacheLine - 1) / kCacheLine;
    next_x.lines_per_step = (args.channels * lines + steps - 1) / steps;
    return next_x;
  }

  Element* hidden_panel(int64_t h0, int64_t panel, const Memory& m) const {
    return split ? m.hidden + (h0 / choice.hidden_chunk * panels + panel) * depth2 * kTokens : m.hidden;
  }

  // hidden = gelu(W1 z + b1) for one panel and the hidden channels [h0 + begin, h0 + end) of the chunk that starts at
  // h0.
  void first_product(int64_t h0, int64_t begin, int64_t end, const Panels& cut, int64_t panel, RowPrefetcher& next_x,
                     const Memory& m) const {
    if constexpr (Gemm::kMostRest > 0)
      if (cut.is_rest(panel)) {
        BlockRests<T, Gemm>{*this, cut, panel, m}.first_product(h0, begin, end);
        return;
      }
    const int vectors = vectors_in(cut, panel);
    const WeightRows<Gemm> weight = fc1.at(0);
    const Element* z = m.z + panel * depth1 * kTokens;
    Element* hidden = hidden_panel(h0, panel, m);
    for (int64_t row = begin; row < end; row += Gemm::kRows) {
      multiply<Gemm>(vectors, weight.data + (h0 + row) * weight.stride, weight.stride, z, depth1, m.rows, false,
                     panel == 0 && row + Gemm::kRows < end);
      next_x.step();
      const float* bias = fc1_bias + h0 + row;
      const int64_t rows = end - row < Gemm::kRows ? end - row : Gemm::kRows;
      for (int64_t i = 0; i < rows; i += 2) {
        const Vec bias_a = Vec::broadcast(bias[i]), bias_b = Vec::broadcast(bias[i + 1]);
        for (int v = 0; v < vectors; ++v) {
          const float* from = m.rows + i * kTokens + v * Vec::kLanes;
          const Vec a = Gemm::gelu(Vec::load(from) + bias_a);
          const Vec b = Gemm::gelu(Vec::load(from + kTokens) + bias_b);
          Gemm::put(hidden, row + i, v * Vec::kLanes, a, b, AllLanes{});
        }
      }
    }
  }

  // sums = or += W2 hidden for one panel, the channels [begin, end) and the chunk that starts at h0. After the last
  // chunk the channels are finished.
  void second_product(int64_t h0, int64_t begin, int64_t end, const Panels& cut, int64_t panel, const Span* spans_end,
                      const Memory& m) const {
    const WeightRows<Gemm> weight = fc2.at(h0);
    const Element* hidden = hidden_panel(h0, panel, m);
    float* sums = m.sums + panel * rows2 * kTokens;
    const bool final = h0 + fc2.chunk_channels(h0) >= args.hidden;
    const Span* first = m.spans;
    while (final && first->panel < panel) ++first;
    const Span* last = first;
    while (final && last < spans_end && last->panel == panel) ++last;
    if constexpr (Gemm::kMostRest > 0)
      if (cut.is_rest(panel)) {
        BlockRests<T, Gemm>{*this, cut, panel, m}.second_product(h0, begin, end, first, last);
        return;
      }
    const int vectors = vectors_in(cut, panel);
    for (int64_t row = begin; row < end; row += Gemm::kRows) {
      if (final) prefetch_x(first, last, row);
      multiply<Gemm>(vectors, weight.data + row * weight.stride, weight.stride, hidden, fc2.padded_depth(h0),
                     sums + row * kTokens, h0 > 0, panel == 0 && row + Gemm::kRows < end);
      for (int64_t c = row; final && c < row + Gemm::kRows && c < end; ++c)
        finish(first, last, c, sums + c * kTokens, m);
    }
  }

  // Prefetches the x of channels [begin, begin + kRows) of a panel, for the residual.
  void prefetch_x(const Span* first, const Span* last, int64_t begin) const {
    const int64_t end = begin + Gemm::kRows < args.channels ? begin + Gemm::kRows : args.channels;
    for (const Span* span = first; span < last; ++span)
      for (int64_t c = begin; c < end; ++c) {
        const T* row = x_row(*span, c);
        const int64_t bytes = span->length * static_cast<int64_t>(sizeof(T));
        prefetch(row, bytes);
        __builtin_prefetch(reinterpret_cast<const char*>(row) + bytes - 1);
      }
  }

  // Channel c of one panel: adds the bias to its sums, applies the layer scale, adds the residual and stores.
  void finish(const Span* first, const Span* last, int64_t c, const float* panel_sums, const Memory& m) const {
    const Vec bias = Vec::broadcast(fc2_bias[c]), scale = Vec::broadcast(layer_scale_2[c]);
    for (const Span* span = first; span < last; ++span) {
      const float* sums = panel_sums + span->token;
      T* out = out_row(*span, c);
      const auto put = [&](auto y) {
        for_each_vector(span->length, [&](int64_t j, auto lanes) {
          store(fma(scale, load(sums + j, lanes) + bias, y(j, lanes)), out + j, lanes);
        });
      };
      if (!args.residual) {
        put([](int64_t, auto) { return Vec::zero(); });
      } else if (args.per_position) {
        const float* kept = m.y + (span->panel * args.channels + c) * kTokens + span->token;
        put([&](int64_t j, auto lanes) { return load(kept + j, lanes); });
      } else {
        const ImageMap map(maps, span->image, args.channels);
        const Vec centre = Vec::broadcast(*map.centre);
        const Vec y_scale = Vec::broadcast(map.y_scale[c]), y_shift = Vec::broadcast(map.y_shift[c]);
        const T* x = x_row(*span, c);
        put([&](int64_t j, auto lanes) {
          const Vec value = load(x + j, lanes);
          return value + fma(y_scale, value - centre, y_shift);
        });
      }
    }
  }

  // Both products of a task. All panels meet one chunk of hidden channels before the next, so that its weights stay in
  // the second-level cache, and the hidden channels of one panel in the first-level cache.
  void multiply_task(const Panels& cut, const Span* spans_end, RowPrefetcher next_x, const Memory& m) const {
    for (int64_t h0 = 0; h0 < args.hidden; h0 += choice.hidden_chunk) {
      const int64_t chunk = fc2.chunk_channels(h0);
      clear_rows<Gemm>(m.hidden, chunk, fc2.padded_depth(h0));
      for (int64_t p = 0; p < cut.count; ++p) {
        first_product(h0, 0, chunk, cut, p, next_x, m);
        second_product(h0, 0, args.channels, cut, p, spans_end, m);
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
    // 1. The norms.
    const int spans = cut_spans(cut, m.spans);
    clear_padding<Gemm>(m.z, cut, args.channels, depth1);
    if (args.per_position) {
      for (int i = 0; i < spans; ++i) normalise_positions(m.spans[i], m);
      turn_rests(cut, 0, args.channels, m);
    } else {
      normalise(cut, spans, 0, args.channels, m);
    }
    // 2. and 3. The products and the residual.
    multiply_task(cut, m.spans + spans, prefetcher_of_x(last, cut.tokens + cut.rests), m);
    // 4. The moments.
    if (args.moments_out)
      moments_of_tiles(static_cast<const T*>(args.out), tasks.tiles, first, last, args.channels, 0, args.channels,
                       partial);
  }

  static void run_tasks(int64_t begin, int64_t end, void* context) {
    Gemm::begin();
    for (int64_t task = begin; task < end; ++task) static_cast<BlockKernel*>(context)->run_task(task);
    Gemm::end();
  }
  static void run_maps(int64_t begin, int64_t end, void* context) {
    const auto& kernel = *static_cast<const BlockKernel*>(context);
    for (int64_t image = begin; image < end; ++image)
      make_block_map(kernel.args, image, ImageMap(kernel.maps, image, kernel.args.channels));
  }

  // LayerNorm: weight and bias of norm 1, with the layer scale and the affine folded in, then those of norm 2.
  void fill_position_maps() const {
    for (int64_t c = 0; c < args.channels; ++c) {
      double weight, bias;
      folded_norm1(args, c, &weight, &bias);
      const double layer_scale = read(args.layer_scale_1, c, 1);
      maps[c] = static_cast<float>(layer_scale * weight);
      maps[args.channels + c] = static_cast<float>(layer_scale * bias);
      maps[2 * args.channels + c] = static_cast<float>(read(args.norm2_weight, c, 1));
      maps[3 * args.channels + c] = static_cast<float>(read(args.norm2_bias, c, 0));
    }
  }

  int64_t run() {
    const int64_t channels = args.channels;
    const int64_t map_floats = args.per_position ? 4 * channels : args.batch * ImageMap::floats(channels);
    const int64_t partial_floats = args.moments_out ? tasks.tiles.count() * 2 * channels : 0;
    Arena arena{nullptr};
    float *bias1, *bias2, *scale2;
    Element *copy1, *copy2;
    const auto take = [&] {
      bias1 = arena.take<float>(args.hidden);
      bias2 = arena.take<float>(channels);
      scale2 = arena.take<float>(channels);
      maps = arena.take<float>(map_floats);
      partial = arena.take<float>(partial_floats);
      copy1 = arena.take<Element>(fc1.copy_elements());
      copy2 = arena.take<Element>(fc2.copy_elements());
    };
    take();
    const int64_t bytes = arena.used;
    const Buffer buffer(bytes);
    if (!buffer.data) return bytes;
    arena = {static_cast<char*>(buffer.data)};
    take();
    fc1.prepare(args.pool, copy1);
    fc2.prepare(args.pool, copy2);
    read_all(args.fc1_bias, args.hidden, 0, bias1);
    read_all(args.fc2_bias, channels, 0, bias2);
    read_all(args.layer_scale_2, channels, 1, scale2);
    fc1_bias = bias1;
    fc2_bias = bias2;
    layer_scale_2 = scale2;
    if (args.per_position)
      fill_position_maps();
    else
      args.pool.run(args.batch, &run_maps, this);
    if (split)
      SplitBlock<T, Gemm>(*this).run();
    else
      args.pool.run(tasks.count, &run_tasks, this);
    if (missing_bytes.load() == 0 && args.moments_out)
      merge_all(args.pool, partial, tasks.tiles, channels, args.moments_out);
    return missing_bytes.load();
  }
};

}  // namespace riformer::RIFORMER_ISA

#include "block_int8.h"
#include "block_rests.h"
#include "block_split.h"

namespace riformer::RIFORMER_ISA {

inline int64_t block(const cpu::BlockArgs& args) {
  return with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (args.int8) return BlockInt8<T>(args).run();
    return BlockKernel<T, typename GemmFor<T>::Type>(args).run();
  });
}

}  // namespace riformer::RIFORMER_ISA
