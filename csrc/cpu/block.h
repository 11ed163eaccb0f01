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
  int64_t hidden_chunk;  // hidden channels between the two products
};

template <class Gemm>
inline BlockChoice choose_block(int64_t channels, int64_t hidden, bool per_position) {
  constexpr int64_t kCacheBytes = RIFORMER_TASK_BYTES;
  constexpr int64_t kChunk = 256;
  const int64_t chunk = hidden < kChunk ? hidden : kChunk;
  const int64_t element = sizeof(typename Gemm::Element);
  const int64_t per_token = (channels + chunk) * element + channels * 4 * (per_position ? 2 : 1);
  int64_t tokens = kCacheBytes / per_token / Gemm::kTokens * Gemm::kTokens;
  tokens = tokens < Gemm::kTokens ? Gemm::kTokens : tokens;
  return {tokens < 384 ? tokens : 384, chunk};
}

template <class T, class Gemm>
struct BlockKernel {
  using Element = typename Gemm::Element;
  static constexpr int kTokens = Gemm::kTokens;

  const cpu::BlockArgs& args;
  BlockChoice choice;
  Tasks tasks;
  int64_t depth1, depth2, rows2, panels;  // padded: channels, hidden chunk, channels as rows; panels of the largest task
  const float *fc1_bias, *fc2_bias, *layer_scale_2;
  float* maps;     // ImageMap of every image, or with per_position four vectors [channels]
  float* partial;  // moments of every tile
  std::atomic<int64_t> missing{0};

  BlockKernel(const cpu::BlockArgs& args_)
      : args(args_),
        choice(choose_block<Gemm>(args.channels, args.hidden, args.per_position)),
        tasks(Tiles(args.batch, args.positions), choice.tokens, args.pool.threads) {
    depth1 = round_up(args.channels, Gemm::kStep);
    depth2 = round_up(choice.hidden_chunk, Gemm::kStep);
    rows2 = round_up(args.channels, Gemm::kRows);
    panels = (tasks.max_tokens() + kTokens - 1) / kTokens;
  }

  struct Memory {
    Element *z, *hidden, *weights;
    float *sums, *rows, *y;
    Piece* pieces;
    int64_t bytes;
  };

  Memory memory(void* base) const {
    Arena arena{static_cast<char*>(base)};
    const int64_t depth = depth1 > depth2 ? depth1 : depth2;
    Memory m;
    m.z = arena.take<Element>(panels * depth1 * kTokens);
    m.hidden = arena.take<Element>(panels * depth2 * kTokens);
    m.weights = arena.take<Element>(Gemm::kCopiedRows * depth);
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

  // Channel by channel over the whole task, so that x is read in runs as long as the task: piece by piece, a third of the
  // time at C = 64 went into waiting for its rows (6 KB apart, which no prefetcher follows).
  void normalise(int pieces, const Memory& m) const {
    for (int64_t c = 0; c < args.channels; c += 2)
      for (const Piece* piece = m.pieces; piece < m.pieces + pieces; ++piece) {
        const ImageMap map(maps, piece->image, args.channels);
        Element* panel = m.z + piece->panel * depth1 * kTokens;
        const T *a = x_row(*piece, c), *b = x_row(*piece, c + 1);
        const Vec centre = Vec::broadcast(*map.centre);
        const Vec scale_a = Vec::broadcast(map.z_scale[c]), shift_a = Vec::broadcast(map.z_shift[c]);
        const Vec scale_b = Vec::broadcast(map.z_scale[c + 1]), shift_b = Vec::broadcast(map.z_shift[c + 1]);
        for (int j = 0; j < piece->length; j += Vec::kLanes) {
          const int n = piece->length - j;
          const Vec za = fma(scale_a, Vec::load_n(a + j, n) - centre, shift_a);
          const Vec zb = fma(scale_b, Vec::load_n(b + j, n) - centre, shift_b);
          Gemm::put(panel, c, piece->token + j, za, zb, n);
        }
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
    ahead.row = static_cast<const char*>(args.x) +
                (tasks.tiles.image(tile) * args.channels * args.positions + start) * size;
    ahead.plane = args.positions * size;
    ahead.bytes = (tokens < left ? tokens : left) * size;
    ahead.rows = args.channels;
    const int64_t calls = (args.hidden / Gemm::kRows + 1) * ((tokens + kTokens - 1) / kTokens);
    ahead.per_call = (args.channels * ((ahead.bytes + 63) / 64) + calls - 1) / calls;
    return ahead;
  }

  // hidden[h0, h0 + chunk) = gelu(W1 z + b1)
  void first_product(int64_t h0, int64_t chunk, int64_t padded, int64_t tokens, Ahead& ahead, const Memory& m) const {
    const WeightPart part{args.fc1_weight.data, args.fc1_weight.dtype, h0 * args.channels, args.channels, chunk,
                          args.channels};
    multiply_panels<Gemm>(
        part, m.z, tokens, depth1, false, m.weights, [&](int64_t, int64_t) { return m.rows; },
        [&](int64_t p, int64_t row, int64_t rows, int vectors, const float* c) {
          ahead.step();
          Element* panel = m.hidden + p * padded * kTokens;
          const float* bias = fc1_bias + h0 + row;
          for (int64_t i = 0; i < rows; i += 2) {
            const Vec bias_a = Vec::broadcast(bias[i]), bias_b = Vec::broadcast(bias[i + 1]);
            for (int v = 0; v < vectors; ++v) {
              const float* from = c + i * kTokens + v * Vec::kLanes;
              const Vec a = Gemm::gelu(Vec::load(from) + bias_a);
              const Vec b = Gemm::gelu(Vec::load(from + kTokens) + bias_b);
              Gemm::put(panel, row + i, v * Vec::kLanes, a, b, Vec::kLanes);
            }
          }
        });
  }

  // sums (+)= W2[:, h0 : h0 + chunk] hidden
  void second_product(int64_t h0, int64_t chunk, int64_t padded, int64_t tokens, const Memory& m) const {
    const WeightPart part{args.fc2_weight.data, args.fc2_weight.dtype, h0, args.hidden, args.channels, chunk};
    multiply_panels<Gemm>(
        part, m.hidden, tokens, padded, h0 > 0, m.weights,
        [&](int64_t p, int64_t row) { return m.sums + (p * rows2 + row) * kTokens; },
        [](int64_t, int64_t, int64_t, int, const float*) {});
  }

  void finish(int pieces, const Memory& m) const {
    const int64_t channels = args.channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Vec bias = Vec::broadcast(fc2_bias[c]), scale = Vec::broadcast(layer_scale_2[c]);
      for (const Piece* piece = m.pieces; piece < m.pieces + pieces; ++piece) {
        const float* sums = m.sums + (piece->panel * rows2 + c) * kTokens + piece->token;
        T* out = out_row(*piece, c);
        const auto store = [&](auto y) {
          for (int j = 0; j < piece->length; j += Vec::kLanes) {
            const int n = piece->length - j;
            fma(scale, Vec::load_n(sums + j, n) + bias, y(j, n)).store_n(out + j, n);
          }
        };
        if (!args.residual) {
          store([](int, int) { return Vec::zero(); });
        } else if (args.per_position) {
          const float* kept = m.y + (piece->panel * channels + c) * kTokens + piece->token;
          store([&](int j, int n) { return Vec::load_n(kept + j, n); });
        } else {
          const ImageMap map(maps, piece->image, channels);
          const Vec centre = Vec::broadcast(*map.centre);
          const Vec y_scale = Vec::broadcast(map.y_scale[c]), y_shift = Vec::broadcast(map.y_shift[c]);
          const T* x = x_row(*piece, c);
          store([&](int j, int n) {
            const Vec value = Vec::load_n(x + j, n);
            return value + fma(y_scale, value - centre, y_shift);
          });
        }
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
      normalise(pieces, m);
    Ahead ahead = ahead_of(last, tokens);
    for (int64_t h0 = 0; h0 < args.hidden; h0 += choice.hidden_chunk) {
      const int64_t left = args.hidden - h0;
      const int64_t chunk = left < choice.hidden_chunk ? left : choice.hidden_chunk;
      const int64_t padded = round_up(chunk, Gemm::kStep);
      if (padded != chunk) clear_padding<Gemm>(m.hidden, tokens, chunk, padded);
      first_product(h0, chunk, padded, tokens, ahead, m);
      second_product(h0, chunk, padded, tokens, m);
    }
    finish(pieces, m);
    if (args.moments_out)
      for (int64_t tile = first; tile < last; ++tile)
        tile_moments(static_cast<const T*>(args.out), tasks.tiles, tile, args.channels, partial);
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
    const int64_t floats = args.hidden + 2 * channels + map_floats + partial_floats;
    const Buffer buffer(floats * static_cast<int64_t>(sizeof(float)));
    if (!buffer.data) return floats * static_cast<int64_t>(sizeof(float));
    float* next = static_cast<float*>(buffer.data);
    const auto take = [&](int64_t count) {
      float* out = next;
      next += count;
      return out;
    };
    float* bias1 = take(args.hidden);
    float* bias2 = take(channels);
    float* scale2 = take(channels);
    maps = take(map_floats);
    partial = take(partial_floats);
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
    args.pool.run(tasks.count, &run_tasks, this);
    if (missing.load() == 0 && args.moments_out)
      merge_all(args.pool, partial, tasks.tiles, channels, args.moments_out);
    return missing.load();
  }
};

template <class T>
inline int64_t block_of(const cpu::BlockArgs& args) {
  return BlockKernel<T, typename GemmFor<T>::Type>(args).run();
}

inline int64_t block(const cpu::BlockArgs& args) {
  if (args.dtype == DType::f32) return block_of<float>(args);
  if (args.dtype == DType::bf16) return block_of<bf16>(args);
  return block_of<f16>(args);
}

}  // namespace riformer::RIFORMER_ISA
