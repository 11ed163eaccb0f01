// The stem and the downsampling convolutions: products of the weights with panels gathered from the image.
#pragma once

#include <atomic>

#include "gemm.h"
#include "moments.h"

namespace riformer::RIFORMER_ISA {

// `n` elements, `step` apart, as float32. The steps that RIFormer uses are constants, which the compiler turns into
// shuffles of whole vectors.
template <class X>
inline void gather(const X* from, int64_t step, int64_t n, float* to) {
  if (step == 2)
    for (int64_t j = 0; j < n; ++j) to[j] = widen(from[2 * j]);
  else if (step == 4)
    for (int64_t j = 0; j < n; ++j) to[j] = widen(from[4 * j]);
  else
    for (int64_t j = 0; j < n; ++j) to[j] = widen(from[step * j]);
}

// Rows of two input channels, padded and split by column modulo the stride: in phase p, element j is padded column
// j * stride + p. A tap of the kernel then reads consecutive elements for consecutive output columns.
struct Phases {
  float* data;
  int64_t stride, columns, pitch, row_size, channel_size;

  static int64_t columns_of(const cpu::EmbedArgs& args) { return args.out_width + (args.kernel_width - 1) / args.stride; }
  static int64_t floats(const cpu::EmbedArgs& args, int64_t rows) {
    return 2 * rows * args.stride * round_up(columns_of(args), 16);
  }
  Phases(const cpu::EmbedArgs& args, int64_t rows, float* data_)
      : data(data_),
        stride(args.stride),
        columns(columns_of(args)),
        pitch(round_up(columns, 16)),
        row_size(stride * pitch),
        channel_size(rows * row_size) {}

  // Padded input rows [first, first + rows) of `channel` of `image` into slot 0 or 1.
  template <class X>
  void fill(const cpu::EmbedArgs& args, int64_t image, int64_t channel, int64_t first, int64_t rows, int slot) const {
    const X* plane = static_cast<const X*>(args.x) + image * args.stride_batch + channel * args.stride_channel;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = first + r - args.padding;
      const bool inside = y >= 0 && y < args.height;
      for (int64_t p = 0; p < stride; ++p) {
        float* to = data + slot * channel_size + r * row_size + p * pitch;
        const int64_t before = args.padding - p;  // padded columns of this phase that lie left of the image
        int64_t begin = before > 0 ? (before + stride - 1) / stride : 0;
        int64_t end = inside && args.width > p - args.padding ? (args.width - 1 + before) / stride + 1 : 0;
        end = end < columns ? end : columns;
        begin = begin < end ? begin : end;
        if (begin < end)
          gather(plane + y * args.stride_row + (begin * stride - before) * args.stride_column,
                 stride * args.stride_column, end - begin, to + begin);
        for (int64_t j = 0; j < begin; ++j) to[j] = 0.f;
        for (int64_t j = end; j < columns; ++j) to[j] = 0.f;
      }
    }
  }

  // Where tap `index` (the taps of slot 0, then those of slot 1) finds output row 0 and column 0.
  int64_t tap_offset(const cpu::EmbedArgs& args, int64_t index) const {
    const int64_t taps = args.kernel_height * args.kernel_width, tap = index % taps;
    const int64_t ky = tap / args.kernel_width, kx = tap % args.kernel_width;
    return index / taps * channel_size + ky * row_size + kx % stride * pitch + kx / stride;
  }
};

template <class X, class T, class Gemm>
struct EmbedKernel {
  using Element = typename Gemm::Element;
  static constexpr int kTokens = Gemm::kTokens;

  const cpu::EmbedArgs& args;
  int64_t taps, chunk, padded, rows;  // chunk: input channels per pass; padded: its depth; rows: output channels
  Tasks tasks;
  int64_t max_rows;  // input rows under one task's positions of one image
  const float* bias = nullptr;
  const int64_t* tap_offsets = nullptr;
  float* partial = nullptr;
  std::atomic<int64_t> missing{0};

  // Input channels whose taps are gathered at once. A few hundred k keep the panel of a pass small, so that a task can
  // have enough tokens for the weights, which it reads once (320 -> 512 channels: 2.9 MB), to be worth the trip.
  static int64_t chunk_of(const cpu::EmbedArgs& args) {
    constexpr int64_t kDepth = 640;
    const int64_t fit = kDepth / (args.kernel_height * args.kernel_width);
    if (fit >= args.in_channels) return args.in_channels;
    return fit >= 32 ? fit / 32 * 32 : (fit >= 2 ? fit / 2 * 2 : 2);
  }

  static int64_t wanted_tokens(int64_t padded, int64_t rows) {
    const int64_t per_token = padded * static_cast<int64_t>(sizeof(Element)) + rows * static_cast<int64_t>(sizeof(float));
    const int64_t fit = RIFORMER_TASK_BYTES / per_token / kTokens * kTokens;
    return fit < kTokens ? kTokens : (fit < 384 ? fit : 384);
  }

  EmbedKernel(const cpu::EmbedArgs& args_)
      : args(args_),
        taps(args.kernel_height * args.kernel_width),
        chunk(chunk_of(args)),
        padded(round_up(chunk * taps, Gemm::kStep < 2 ? 2 : Gemm::kStep)),
        rows(round_up(args.channels, Gemm::kRows)),
        tasks(Tiles(args.batch, args.out_height * args.out_width), wanted_tokens(padded, rows), args.pool.threads) {
    const int64_t spanned = (tasks.max_tokens() + args.out_width - 1) / args.out_width + 1;
    const int64_t out_rows = spanned < args.out_height ? spanned : args.out_height;
    max_rows = (out_rows - 1) * args.stride + args.kernel_height;
  }

  struct Memory {
    Element *panel, *weights;
    float *sums, *phases;
    Piece* pieces;
    int64_t bytes;
  };
  Memory memory(void* base) const {
    Arena arena{static_cast<char*>(base)};
    const int64_t panels = (tasks.max_tokens() + kTokens - 1) / kTokens;
    Memory m;
    m.panel = arena.take<Element>(panels * padded * kTokens);
    m.weights = arena.take<Element>(Gemm::kCopiedRows * padded);
    m.sums = arena.take<float>(panels * rows * kTokens);
    m.phases = arena.take<float>(Phases::floats(args, max_rows));
    m.pieces = arena.take<Piece>(max_pieces(tasks, kTokens));
    m.bytes = arena.used;
    return m;
  }

  // Rows k and k + 1 of the panels, for the positions of one piece, whose first one is at `row`, `column`; `a` and `b`
  // are the taps there, b null for zeros.
  void put_taps(const Piece& piece, int64_t column, int64_t k, const float* a, const float* b, int64_t row_step,
                Element* panel) const {
    for (int done = 0; done < piece.length;) {
      const int64_t room = args.out_width - column;
      const int run = static_cast<int>(piece.length - done < room ? piece.length - done : room);
      for (int j = 0; j < run; j += Vec::kLanes) {
        const Vec value_b = b ? Vec::load_n(b + column + j, run - j) : Vec::zero();
        Gemm::put(panel, k, piece.token + done + j, Vec::load_n(a + column + j, run - j), value_b, run - j);
      }
      done += run;
      column = 0;
      a += row_step;
      if (b) b += row_step;
    }
  }

  // Fills the panels with input channels [begin, end) under the pieces [first, last), which are one run of positions of
  // one image.
  void fill(const Piece* first, const Piece* last, int64_t begin, int64_t end, int64_t padded_depth,
            const Memory& m) const {
    const int64_t image = first->image, stop = last[-1].position + last[-1].length;
    const int64_t first_row = first->position / args.out_width, last_row = (stop - 1) / args.out_width;
    const int64_t input_rows = (last_row - first_row) * args.stride + args.kernel_height;
    const Phases phases(args, max_rows, m.phases);
    const int64_t row_step = args.stride * phases.row_size;  // from an output row to the next
    for (int64_t channel = begin; channel < end; channel += 2) {
      const int channels = channel + 1 < end ? 2 : 1;
      for (int slot = 0; slot < channels; ++slot)
        phases.fill<X>(args, image, channel + slot, first_row * args.stride, input_rows, slot);
      const int64_t pairs = args.weight_channels_last ? taps : (channels * taps + 1) / 2;
      for (const Piece* piece = first; piece < last; ++piece) {
        const int64_t row = piece->position / args.out_width, column = piece->position % args.out_width;
        const float* start = m.phases + (row - first_row) * row_step;
        Element* panel = m.panel + piece->panel * padded_depth * kTokens;
        for (int64_t t = 0; t < pairs; ++t) {
          const int64_t one = args.weight_channels_last ? t : 2 * t, other = args.weight_channels_last ? t + taps : one + 1;
          const int64_t k = args.weight_channels_last ? t * (end - begin) + channel - begin : (channel - begin) * taps + one;
          put_taps(*piece, column, k, start + tap_offsets[one],
                   other < channels * taps ? start + tap_offsets[other] : nullptr, row_step, panel);
        }
      }
    }
  }

  // The weights of input channels [begin, end), in the order in which `fill` gathers.
  WeightPart weights(int64_t begin, int64_t end) const {
    const int64_t depth = args.in_channels * taps;
    if (!args.weight_channels_last)
      return {args.weight.data, args.weight.dtype, begin * taps, depth, args.channels, (end - begin) * taps};
    return {args.weight.data, args.weight.dtype, begin, depth, args.channels, end - begin, taps, args.in_channels};
  }

  void finish(const Piece& piece, const Memory& m) const {
    const int64_t positions = tasks.tiles.positions;
    for (int64_t c = 0; c < args.channels; ++c) {
      const float* sums = m.sums + (piece.panel * rows + c) * kTokens + piece.token;
      T* out = static_cast<T*>(args.out) + (piece.image * args.channels + c) * positions + piece.position;
      const Vec shift = Vec::broadcast(bias[c]);
      for (int j = 0; j < piece.length; j += Vec::kLanes)
        (Vec::load_n(sums + j, piece.length - j) + shift).store_n(out + j, piece.length - j);
    }
  }

  void run_task(int64_t task) {
    const int64_t first = tasks.first(task), last = tasks.first(task + 1);
    if (first == last) return;
    const int64_t bytes = memory(nullptr).bytes;
    void* base = cpu::thread_scratch(bytes);
    if (!base) {
      missing.store(bytes);
      return;
    }
    const Memory m = memory(base);
    int64_t tokens;
    const int pieces = cut_pieces(tasks.tiles, first, last, kTokens, m.pieces, &tokens);
    for (int64_t begin = 0; begin < args.in_channels; begin += chunk) {
      const int64_t end = begin + chunk < args.in_channels ? begin + chunk : args.in_channels;
      const int64_t depth = round_up((end - begin) * taps, 2);
      const int64_t padded_depth = round_up(depth, Gemm::kStep);
      clear_padding<Gemm>(m.panel, tokens, depth, padded_depth);
      for (int i = 0, run = 0; i < pieces; ++i) {
        if (i + 1 < pieces && m.pieces[i + 1].image == m.pieces[i].image) continue;
        fill(m.pieces + run, m.pieces + i + 1, begin, end, padded_depth, m);
        run = i + 1;
      }
      multiply_panels<Gemm>(
          weights(begin, end), m.panel, tokens, padded_depth, begin > 0, m.weights,
          [&](int64_t p, int64_t row) { return m.sums + (p * rows + row) * kTokens; },
          [](int64_t, int64_t, int64_t, int, const float*) {});
    }
    for (int i = 0; i < pieces; ++i) finish(m.pieces[i], m);
    if (args.moments_out)
      for (int64_t tile = first; tile < last; ++tile)
        tile_moments(static_cast<const T*>(args.out), tasks.tiles, tile, args.channels, partial);
  }

  static void run_tasks(int64_t begin, int64_t end, void* context) {
    Gemm::begin();
    for (int64_t task = begin; task < end; ++task) static_cast<EmbedKernel*>(context)->run_task(task);
    Gemm::end();
  }

  int64_t run() {
    const int64_t partial_floats = args.moments_out ? tasks.tiles.count() * 2 * args.channels : 0;
    const int64_t bytes = 2 * taps * static_cast<int64_t>(sizeof(int64_t)) +
                          (args.channels + partial_floats) * static_cast<int64_t>(sizeof(float));
    const Buffer buffer(bytes);
    if (!buffer.data) return bytes;
    int64_t* offsets = static_cast<int64_t*>(buffer.data);
    const Phases phases(args, max_rows, nullptr);
    for (int64_t t = 0; t < 2 * taps; ++t) offsets[t] = phases.tap_offset(args, t);
    tap_offsets = offsets;
    float* shift = reinterpret_cast<float*>(offsets + 2 * taps);
    partial = shift + args.channels;
    read_all(args.bias, args.channels, 0, shift);
    bias = shift;
    args.pool.run(tasks.count, &run_tasks, this);
    if (missing.load() == 0 && args.moments_out)
      merge_all(args.pool, partial, tasks.tiles, args.channels, args.moments_out);
    return missing.load();
  }
};

template <class X>
inline int64_t embed_from(const cpu::EmbedArgs& args) {
  if (args.dtype == DType::f32) return EmbedKernel<X, float, typename GemmFor<float>::Type>(args).run();
  if (args.dtype == DType::bf16) return EmbedKernel<X, bf16, typename GemmFor<bf16>::Type>(args).run();
  return EmbedKernel<X, f16, typename GemmFor<f16>::Type>(args).run();
}

inline int64_t embed(const cpu::EmbedArgs& args) {
  if (args.x_dtype == DType::f32) return embed_from<float>(args);
  if (args.x_dtype == DType::bf16) return embed_from<bf16>(args);
  return embed_from<f16>(args);
}

}  // namespace riformer::RIFORMER_ISA
