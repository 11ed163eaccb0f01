// One RIFormer block in one pass: x is read, out is written, and the hidden tensor lives in a core's own cache.
//
// A task is a run of tokens. It normalises them into panels of the product's element type (both norms and the first
// residual are one affine map per image and channel), then for each chunk of hidden channels multiplies by W1, applies
// GELU and multiplies by W2 into float32 sums, and at last adds the residual, stores, and takes the moments of what it
// stored.
#pragma once

#include <atomic>

#include "gemm.h"
#include "moments.h"
#include "norm_map.h"

namespace riformer::RIFORMER_ISA {

// What a task is cut into. A function of the widths alone, never of the batch.
struct BlockChoice {
  int64_t tokens;        // wanted per task
  int64_t hidden_chunk;  // hidden channels between the two products: a panel of them stays in the first-level cache
};

template <class Gemm>
inline BlockChoice choose_block(int64_t channels, int64_t hidden, bool per_position) {
  const int64_t element = sizeof(typename Gemm::Element);
  const int64_t fit = 512 / element;
  const int64_t per_token = channels * (element + 4 + (per_position ? 4 : 0));
  int64_t tokens = task_bytes<Gemm>() / per_token / Gemm::kTokens * Gemm::kTokens;
  tokens = tokens < Gemm::kTokens ? Gemm::kTokens : tokens;
  return {tokens < 384 ? tokens : 384, hidden < fit ? hidden : fit};
}

template <class T, class Gemm>
struct SplitBlock;

// Whether the threads share the channels: when there is less than a task of tokens for each, all of them would read all
// weights, which at batch 1 is what takes the time (bench/NOTES.md). The bits are the same either way.
inline bool splits_channels(const cpu::BlockArgs& args, const Tasks& tasks) {
  constexpr int64_t kMostTokens = 384;
  return args.pool.threads > 1 && !args.per_position && tasks.count <= args.pool.threads &&
         args.batch * args.positions <= kMostTokens;
}

template <class T, class Gemm>
struct BlockKernel {
  using Element = typename Gemm::Element;
  static constexpr int kTokens = Gemm::kTokens;

  const cpu::BlockArgs& args;
  BlockChoice choice;
  Weights<Gemm> fc1, fc2;
  Tasks tasks;
  int64_t depth1, depth2, rows2,
      panels;  // padded: channels, hidden chunk, channels as rows; panels of the largest task
  const float *fc1_bias, *fc2_bias, *layer_scale_2;
  float* maps;     // ImageMap of every image, or with per_position four vectors [channels]
  float* partial;  // moments of every tile
  std::atomic<int64_t> missing{0};
  bool split;  // the threads share the channels, not the tokens: see block_split.h

  BlockKernel(const cpu::BlockArgs& args_)
      : args(args_),
        choice(choose_block<Gemm>(args.channels, args.hidden, args.per_position)),
        fc1{args.fc1_weight, args.hidden, args.channels, 1, args.channels, false},
        fc2{args.fc2_weight, args.channels, args.hidden, 1, choice.hidden_chunk, false},
        tasks(Tiles(args.batch, args.positions), choice.tokens, args.pool.threads) {
    depth1 = fc1.padded_depth(0);
    depth2 = fc2.padded_depth(0);
    rows2 = fc2.padded_rows();
    split = splits_channels(args, tasks);
    if (split) tasks = Tasks(tasks.tiles, args.batch * args.positions, 1);
    panels = (tasks.max_tokens() + kTokens - 1) / kTokens;
  }

  struct Memory {
    Element *z, *hidden;  // panels of the task; one panel of a chunk, or with `split` all of them
    float *sums, *rows, *y;
    Piece* pieces;
    int64_t bytes;
  };

  Memory memory(void* base) const {
    Arena arena{static_cast<char*>(base)};
    Memory m;
    m.z = arena.take<Element>(panels * depth1 * kTokens);
    m.hidden = arena.take<Element>(depth2 * kTokens);
    m.sums = arena.take<float>(panels * rows2 * kTokens);
    m.rows = arena.take<float>(Gemm::kRows * kTokens);
    m.y = arena.take<float>(args.per_position ? panels * args.channels * kTokens : 0);
    m.pieces = arena.take<Piece>(max_pieces(tasks, kTokens));
    m.bytes = arena.used;
    return m;
  }

  const T* x_row(const Piece& piece, int64_t c) const {
    return static_cast<const T*>(args.x) + (piece.image * args.channels + c) * args.positions + piece.position;
  }
  T* out_row(const Piece& piece, int64_t c) const {
    return static_cast<T*>(args.out) + (piece.image * args.channels + c) * args.positions + piece.position;
  }

  // Channels [begin, end), one by one over the whole task, so that x is read in runs as long as the task: piece by
  // piece, a third of the time at C = 64 went into waiting for its rows (6 KB apart, which no prefetcher follows).
  void normalise(int pieces, int64_t begin, int64_t end, const Memory& m) const {
    for (int64_t c = begin; c < end; c += 2)
      for (const Piece* piece = m.pieces; piece < m.pieces + pieces; ++piece) {
        const ImageMap map(maps, piece->image, args.channels);
        Element* panel = m.z + piece->panel * depth1 * kTokens;
        const T *a = x_row(*piece, c), *b = x_row(*piece, c + 1);
        const Vec centre = Vec::broadcast(*map.centre);
        const Vec scale_a = Vec::broadcast(map.z_scale[c]), shift_a = Vec::broadcast(map.z_shift[c]);
        const Vec scale_b = Vec::broadcast(map.z_scale[c + 1]), shift_b = Vec::broadcast(map.z_shift[c + 1]);
        for_each_vector(piece->length, [&](int64_t j, auto lanes) {
          const Vec za = fma(scale_a, load(a + j, lanes) - centre, shift_a);
          const Vec zb = fma(scale_b, load(b + j, lanes) - centre, shift_b);
          Gemm::put(panel, c, piece->token + j, za, zb, lanes);
        });
      }
  }

  // LayerNorm: y is kept in float32 for the residual, since its statistics come after it.
  void normalise_positions(const Piece& piece, const Memory& m) const {
    const int64_t channels = args.channels;
    const float *weight1 = maps, *bias1 = maps + channels, *weight2 = bias1 + channels, *bias2 = weight2 + channels;
    Element* panel = m.z + piece.panel * depth1 * kTokens;
    float* y = m.y + piece.panel * channels * kTokens + piece.token;
    for (int j = 0; j < piece.length; j += Vec::kLanes) {
      const int n = piece.length - j;
      Vec mean, rstd;
      if (args.norm1_weight.data) {
        position_statistics(
            channels, args.eps1, [&](int64_t c) { return Vec::load_n(x_row(piece, c) + j, n); }, &mean, &rstd);
        for (int64_t c = 0; c < channels; ++c) {
          const Vec x = Vec::load_n(x_row(piece, c) + j, n);
          const Vec normed = fma((x - mean) * rstd, Vec::broadcast(weight1[c]), Vec::broadcast(bias1[c]));
          (x + normed).store_n(y + c * kTokens + j, n);
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) Vec::load_n(x_row(piece, c) + j, n).store_n(y + c * kTokens + j, n);
      }
      position_statistics(
          channels, args.eps2, [&](int64_t c) { return Vec::load_n(y + c * kTokens + j, n); }, &mean, &rstd);
      for (int64_t c = 0; c < channels; c += 2) {
        const Vec a = (Vec::load_n(y + c * kTokens + j, n) - mean) * rstd;
        const Vec b = (Vec::load_n(y + (c + 1) * kTokens + j, n) - mean) * rstd;
        Gemm::put(panel, c, piece.token + j, fma(a, Vec::broadcast(weight2[c]), Vec::broadcast(bias2[c])),
                  fma(b, Vec::broadcast(weight2[c + 1]), Vec::broadcast(bias2[c + 1])), n);
      }
    }
  }

  // The next task's x, fetched a few lines at a time while this one multiplies: its rows lie a whole image plane apart,
  // so the hardware does not see them coming.
  struct Ahead {
    const char* row = nullptr;
    int64_t plane = 0, bytes = 0, rows = 0, offset = 0, per_call = 0;

    void step() {
      for (int64_t i = 0; i < per_call && rows > 0; ++i) {
        __builtin_prefetch(row + offset, 0, 2);
        offset += 64;
        if (offset >= bytes) {
          offset = 0;
          row += plane;
          --rows;
        }
      }
    }
  };
  Ahead ahead_of(int64_t tile, int64_t tokens) const {
    Ahead ahead;
    if (tile >= tasks.tiles.count() || args.per_position) return ahead;
    const int64_t start = tasks.tiles.start(tile), left = args.positions - start;
    const int64_t size = sizeof(T);
    ahead.row =
        static_cast<const char*>(args.x) + (tasks.tiles.image(tile) * args.channels * args.positions + start) * size;
    ahead.plane = args.positions * size;
    ahead.bytes = (tokens < left ? tokens : left) * size;
    ahead.rows = args.channels;
    const int64_t calls = (args.hidden / Gemm::kRows + 1) * ((tokens + kTokens - 1) / kTokens);
    ahead.per_call = (args.channels * ((ahead.bytes + 63) / 64) + calls - 1) / calls;
    return ahead;
  }

  Element* hidden_panel(int64_t h0, int64_t panel, const Memory& m) const {
    return split ? m.hidden + (h0 / choice.hidden_chunk * panels + panel) * depth2 * kTokens : m.hidden;
  }

  // hidden = gelu(W1 z + b1) for hidden channels [h0 + begin, h0 + end) of a chunk and one panel
  void first_product(int64_t h0, int64_t begin, int64_t end, int64_t panel, int vectors, Ahead& ahead,
                     const Memory& m) const {
    const WeightRows<Gemm> weight = fc1.at(0);
    const Element* z = m.z + panel * depth1 * kTokens;
    Element* hidden = hidden_panel(h0, panel, m);
    for (int64_t row = begin; row < end; row += Gemm::kRows) {
      if (panel == 0) fetch_rows(weight, h0 + row + Gemm::kRows, h0 + end, depth1);
      multiply<Gemm>(vectors, weight.data + (h0 + row) * weight.stride, weight.stride, z, depth1, m.rows, false);
      ahead.step();
      const float* bias = fc1_bias + h0 + row;
      const int64_t rows = end - row < Gemm::kRows ? end - row : Gemm::kRows;
      for (int64_t i = 0; i < rows; i += 2) {
        const Vec bias_a = Vec::broadcast(bias[i]), bias_b = Vec::broadcast(bias[i + 1]);
        for (int v = 0; v < vectors; ++v) {
          const float* from = m.rows + i * kTokens + v * Vec::kLanes;
          const Vec a = Gemm::gelu(Vec::load(from) + bias_a);
          const Vec b = Gemm::gelu(Vec::load(from + kTokens) + bias_b);
          Gemm::put(hidden, row + i, v * Vec::kLanes, a, b, Full{});
        }
      }
    }
  }

  // Rows [begin, end) of sums (+)= W2[:, h0 : h0 + chunk] hidden for one panel; after the last chunk they are finished.
  void second_product(int64_t h0, int64_t begin, int64_t end, int64_t panel, int vectors, const Piece* pieces_end,
                      const Memory& m) const {
    const WeightRows<Gemm> weight = fc2.at(h0);
    const Element* hidden = hidden_panel(h0, panel, m);
    float* sums = m.sums + panel * rows2 * kTokens;
    const bool final = h0 + fc2.chunk_channels(h0) >= args.hidden;
    const Piece* first = m.pieces;
    while (final && first->panel < panel) ++first;
    const Piece* last = first;
    while (final && last < pieces_end && last->panel == panel) ++last;
    for (int64_t row = begin; row < end; row += Gemm::kRows) {
      if (panel == 0) fetch_rows(weight, row + Gemm::kRows, end, fc2.depth(h0));
      if (final) fetch(first, last, row);
      multiply<Gemm>(vectors, weight.data + row * weight.stride, weight.stride, hidden, fc2.padded_depth(h0),
                     sums + row * kTokens, h0 > 0);
      for (int64_t c = row; final && c < row + Gemm::kRows && c < end; ++c) finish(first, last, c, m);
    }
  }

  // The x of channels [begin, begin + kRows) of a panel: its rows lie an image plane apart.
  void fetch(const Piece* first, const Piece* last, int64_t begin) const {
    const int64_t end = begin + Gemm::kRows < args.channels ? begin + Gemm::kRows : args.channels;
    for (const Piece* piece = first; piece < last; ++piece)
      for (int64_t c = begin; c < end; ++c) {
        const char* row = reinterpret_cast<const char*>(x_row(*piece, c));
        const int64_t bytes = piece->length * static_cast<int64_t>(sizeof(T));
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
        __builtin_prefetch(row + bytes - 1);
      }
  }

  // Channel c of a panel: the bias, the layer scale and the residual; stored.
  void finish(const Piece* first, const Piece* last, int64_t c, const Memory& m) const {
    const Vec bias = Vec::broadcast(fc2_bias[c]), scale = Vec::broadcast(layer_scale_2[c]);
    for (const Piece* piece = first; piece < last; ++piece) {
      const float* sums = m.sums + (piece->panel * rows2 + c) * kTokens + piece->token;
      T* out = out_row(*piece, c);
      const auto put = [&](auto y) {
        for_each_vector(piece->length, [&](int64_t j, auto lanes) {
          store(fma(scale, load(sums + j, lanes) + bias, y(j, lanes)), out + j, lanes);
        });
      };
      if (!args.residual) {
        put([](int64_t, auto) { return Vec::zero(); });
      } else if (args.per_position) {
        const float* kept = m.y + (piece->panel * args.channels + c) * kTokens + piece->token;
        put([&](int64_t j, auto lanes) { return load(kept + j, lanes); });
      } else {
        const ImageMap map(maps, piece->image, args.channels);
        const Vec centre = Vec::broadcast(*map.centre);
        const Vec y_scale = Vec::broadcast(map.y_scale[c]), y_shift = Vec::broadcast(map.y_shift[c]);
        const T* x = x_row(*piece, c);
        put([&](int64_t j, auto lanes) {
          const Vec value = load(x + j, lanes);
          return value + fma(y_scale, value - centre, y_shift);
        });
      }
    }
  }

  // The panels of a task, one after the other for each chunk of hidden channels: a chunk's weights stay in the
  // second-level cache meanwhile, and a panel's hidden channels in the first.
  void multiply_task(int64_t tokens, const Piece* pieces_end, Ahead ahead, const Memory& m) const {
    for (int64_t h0 = 0; h0 < args.hidden; h0 += choice.hidden_chunk) {
      const int64_t chunk = fc2.chunk_channels(h0);
      clear_rows<Gemm>(m.hidden, chunk, fc2.padded_depth(h0));
      for (int64_t p = 0; p * kTokens < tokens; ++p) {
        const int vectors = vectors_in<Gemm>(tokens, p);
        first_product(h0, 0, chunk, p, vectors, ahead, m);
        second_product(h0, 0, args.channels, p, vectors, pieces_end, m);
      }
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
    clear_padding<Gemm>(m.z, tokens, args.channels, depth1);
    if (args.per_position)
      for (int i = 0; i < pieces; ++i) normalise_positions(m.pieces[i], m);
    else
      normalise(pieces, 0, args.channels, m);
    multiply_task(tokens, m.pieces + pieces, ahead_of(last, tokens), m);
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
    if (missing.load() == 0 && args.moments_out) merge_all(args.pool, partial, tasks.tiles, channels, args.moments_out);
    return missing.load();
  }
};

}  // namespace riformer::RIFORMER_ISA

#include "block_split.h"

namespace riformer::RIFORMER_ISA {

inline int64_t block(const cpu::BlockArgs& args) {
  return with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    return BlockKernel<T, typename GemmFor<T>::Type>(args).run();
  });
}

}  // namespace riformer::RIFORMER_ISA
