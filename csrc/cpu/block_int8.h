// A block whose products are int8: block.h with other panels and weights. The tokens, the norms, GELU, the residual and
// the moments are as there.
//
//     W1 z      z without its mean, as bytes with a scale and a lowest value per token;  W1 with a scale per row
//     W2 hidden hidden as bytes with a scale per token and chunk;                        W2 with one per row and chunk
//
// No scale is calibrated, and none is kept from call to call. The means that the biases are corrected by are in
// int8_means.h, the weights in quantise.h. Scales, sizes of chunks and sums of bytes are the same for every instruction
// set; the sums of the corrections and GELU may differ in their last bits.
#pragma once

#include "block.h"
#include "int8_means.h"
#include "quantise.h"

namespace riformer::RIFORMER_ISA {

// The hidden channels that share a scale per token. Fewer are more exact (S12's features: 1.22x of eager bfloat16's
// error with 256, 1.18x with 128), but then sums are scaled and added more often: with 128 a block takes 2 to 4 %
// longer.
constexpr int64_t kInt8Chunk = 256;

// GELU is not less than -0.16998. Added to it, so that a byte can be unsigned.
constexpr float kGeluShift = 0.17f;

template <>
inline BlockChoice choose_block<GemmInt8>(int64_t channels, int64_t hidden, bool per_position) {
  const int64_t per_token = channels * (per_position ? 9 : 5);  // z, sums and y
  const int64_t tokens = RIFORMER_TASK_BYTES / per_token / GemmInt8::kTokens * GemmInt8::kTokens;
  const int64_t most = tokens < kMostTaskTokens ? tokens : kMostTaskTokens;
  return {most < GemmInt8::kTokens ? GemmInt8::kTokens : most, hidden < kInt8Chunk ? hidden : kInt8Chunk};
}

template <class T>
struct BlockInt8 : BlockKernel<T, GemmInt8> {
  using Gemm = GemmInt8;
  using Base = BlockKernel<T, Gemm>;
  using Base::args, Base::choice, Base::maps, Base::panels, Base::tasks, Base::partial, Base::rows2, Base::depth1;
  static constexpr int kTokens = Gemm::kTokens;

  Int8Weights w1, w2;
  Int8Means means;
  int64_t pitch;         // of the biases' rows, so that a vector may be loaded at any image
  float *bias1, *bias2;  // [hidden][pitch] and [channels][pitch]: corrected, for each image
  float* hidden_mean;    // [image][hidden], estimated
  float *plain_bias1, *plain_bias2;

  explicit BlockInt8(const cpu::BlockArgs& args_)
      : Base(args_),
        w1(args.fc1_weight, args.hidden, args.channels, args.channels),
        w2(args.fc2_weight, args.channels, args.hidden, choice.hidden_chunk),
        pitch(args.batch + Vec::kLanes) {
    // The threads always share the tokens: they share the quantising of the weights, and bytes are soon read.
    this->split = false;
    tasks = Tasks(tasks.tiles, choice.tokens, args.pool.threads);
    panels = max_panels(tasks, kTokens, Gemm::kMostRest);
  }

  struct Memory : Base::Memory {
    float* before;              // [hidden chunk][kTokens]: what GELU takes
    int32_t* whole;             // the result of one call of a product
    float *low, *scale;         // of z, per token of the task
    float *top, *hidden_scale;  // per token of the panel: the largest of `before`, and the scale of GELU's results
    int32_t* lanes;             // per token of the task: its image, counted from that of its vector's first token
    int64_t* images;            // per vector of the task: the image of its first token
  };

  Memory memory(void* base) const {
    Arena arena{static_cast<char*>(base)};
    Memory m;
    const int64_t tokens = panels * kTokens;
    m.z = arena.take<uint8_t>(tokens * args.channels);
    m.hidden = arena.take<uint8_t>(choice.hidden_chunk * kTokens);
    m.sums = arena.take<float>(tokens * rows2);
    m.rows = nullptr;
    m.y = arena.take<float>(args.per_position ? tokens * args.channels : 0);
    m.spans = arena.take<Span>(max_spans(tasks, kTokens));
    m.before = arena.take<float>(choice.hidden_chunk * kTokens);
    m.whole = arena.take<int32_t>(Gemm::kRows * kTokens);
    m.low = arena.take<float>(tokens);
    m.scale = arena.take<float>(tokens);
    m.top = arena.take<float>(kTokens);
    m.hidden_scale = arena.take<float>(kTokens);
    m.lanes = arena.take<int32_t>(tokens);
    m.images = arena.take<int64_t>(tokens / Vec::kLanes);
    m.bytes = arena.used;
    return m;
  }

  // Which image each token belongs to. Tokens past the last one count as the first image's.
  void find_images(int spans, const Memory& m) const {
    for (int64_t token = 0; token < panels * kTokens; ++token) m.lanes[token] = 0;
    for (int64_t vector = 0; vector < panels * kTokens / Vec::kLanes; ++vector) m.images[vector] = m.spans[0].image;
    for (const Span* span = m.spans; span < m.spans + spans; ++span)
      for (int j = 0; j < span->length; ++j) {
        const int64_t token = span->panel * kTokens + span->token + j, vector = token / Vec::kLanes;
        if (token % Vec::kLanes == 0) m.images[vector] = span->image;
        m.lanes[token] = static_cast<int32_t>(span->image - m.images[vector]);
      }
  }

  // The bytes of z, without its mean. values(span, c) gives a function of (i, position of the span, lanes): channel c +
  // i.
  template <class Values>
  void bytes_of_z(int spans, const Values& values, const Memory& m) const {
    const int64_t tokens = panels * kTokens;
    for (int64_t token = 0; token < tokens; ++token) m.low[token] = m.scale[token] = 0;  // zero is in every range
    // The lowest and the highest value of each token. Four channels at a time, as one lane of a panel holds.
    for (int64_t c = 0; c < args.channels; c += 4)
      for (const Span* span = m.spans; span < m.spans + spans; ++span) {
        const auto z = values(*span, c);
        float *low = m.low + span->panel * kTokens + span->token, *high = m.scale + (low - m.low);
        for_each_vector(span->length, [&](int64_t j, auto lanes) {
          const Vec a = z(0, j, lanes), b = z(1, j, lanes), d = z(2, j, lanes), e = z(3, j, lanes);
          store(smaller(load(low + j, lanes), smaller(smaller(a, b), smaller(d, e))), low + j, lanes);
          store(larger(load(high + j, lanes), larger(larger(a, b), larger(d, e))), high + j, lanes);
        });
      }
    for (int64_t token = 0; token < tokens; token += Vec::kLanes) {
      const Vec range = Vec::load(m.scale + token) - Vec::load(m.low + token);
      (larger(Vec::broadcast(kSmallestRange), range) * Vec::broadcast(1.f / 255.f)).store(m.scale + token);
    }
    // The bytes.
    for (int64_t c = 0; c < args.channels; c += 4)
      for (const Span* span = m.spans; span < m.spans + spans; ++span) {
        const auto z = values(*span, c);
        const float *low = m.low + span->panel * kTokens + span->token, *scale = m.scale + (low - m.low);
        uint8_t* to = Gemm::at(m.z + span->panel * depth1 * kTokens, c, span->token);
        for_each_vector(span->length, [&](int64_t j, auto lanes) {
          const Vec lowest = load(low + j, lanes), inverse = reciprocal(load(scale + j, lanes));
          const auto scaled = [&](int i) { return (z(i, j, lanes) - lowest) * inverse; };
          put_bytes(to + 4 * j, scaled(0), scaled(1), scaled(2), scaled(3), lanes);
        });
      }
  }

  // z of one image is an affine map of x, so without its mean it is z_scale (x - mean of x).
  void normalise(int spans, const Memory& m) const {
    bytes_of_z(
        spans,
        [&](const Span& span, int64_t c) {
          const ImageMap map(maps, span.image, args.channels);
          const float* mean = args.moments + span.image * 2 * args.channels + c;
          const T* x = this->x_row(span, c);
          const int64_t row = args.positions;
          const Vec scales[4] = {Vec::broadcast(map.z_scale[c]), Vec::broadcast(map.z_scale[c + 1]),
                                 Vec::broadcast(map.z_scale[c + 2]), Vec::broadcast(map.z_scale[c + 3])};
          const Vec centres[4] = {Vec::broadcast(mean[0]), Vec::broadcast(mean[1]), Vec::broadcast(mean[2]),
                                  Vec::broadcast(mean[3])};
          return [=](int i, int64_t j, auto lanes) {
            return keep(load(x + i * row + j, lanes) - centres[i], lanes) * scales[i];
          };
        },
        m);
  }

  // With LayerNorm z is not kept: it takes the place of y at first, and y is computed anew for the residual.
  void normalise_positions(int spans, const Memory& m) const {
    for (int i = 0; i < spans; ++i) means.z_of(*this, m.spans[i], m.y);
    bytes_of_z(
        spans,
        [&](const Span& span, int64_t c) {
          const float* mean = means.z_mean + span.image * args.channels + c;
          const float* z = m.y + (span.panel * args.channels + c) * kTokens + span.token;
          return [=](int i, int64_t j, auto lanes) {
            return keep(load(z + i * kTokens + j, lanes) - Vec::broadcast(mean[i]), lanes);
          };
        },
        m);
    for (int i = 0; i < spans; ++i) means.y_of(*this, m.spans[i], m.y);
  }

  // before = W1 z + b1 for one panel and the chunk at h0.
  void first_product(int64_t h0, int64_t chunk, int64_t panel, int vectors, RowPrefetcher& next_x,
                     const Memory& m) const {
    for (int token = 0; token < kTokens; ++token) m.top[token] = 0;
    for (int64_t row = 0; row < chunk; row += Gemm::kRows) {
      multiply_int8(vectors, w1.at(0, h0 + row), args.channels, m.z + panel * kTokens * depth1, depth1, m.whole);
      for (int vector = 0; vector < vectors; ++vector) first_sums(h0, row, panel * Gemm::kVectors + vector, m);
      next_x.step();
    }
  }

  // The sums of rows [row, row + kRows) of the chunk, as float32, for one vector of the task.
  [[gnu::noinline]] void first_sums(int64_t h0, int64_t row, int64_t vector, const Memory& m) const {
    const int64_t token = vector * Vec::kLanes, at = token % kTokens;
    const float *scales = w1.scales + h0 + row, *sums = w1.sums + h0 + row;
    const float* bias = bias1 + (h0 + row) * pitch + m.images[vector];
    const int32_t* whole = m.whole + at;
    float* before = m.before + row * kTokens + at;
    const Ints image = Ints::load(m.lanes + token);
    const Vec lowest = Vec::load(m.low + token), step = Vec::load(m.scale + token);
    Vec top = Vec::load(m.top + at);
    for (int i = 0; i < Gemm::kRows; ++i) {
      const Vec sum = fma(step, load_whole(whole), lowest * Vec::broadcast(sums[i]));
      const Vec value = fma(Vec::broadcast(scales[i]), sum, lookup(bias, image));
      value.store(before);
      top = larger(top, value);
      whole += kTokens;
      before += kTokens;
      bias += pitch;
    }
    top.store(m.top + at);
  }

  // hidden = gelu(before), as bytes.
  void bytes_of_hidden(int64_t chunk, int vectors, const Memory& m) const {
    const Vec shift = Vec::broadcast(kGeluShift);
    for (int64_t at = 0; at < vectors * Vec::kLanes; at += Vec::kLanes) {
      const Vec scale = (gelu_bfloat16(Vec::load(m.top + at)) + shift) * Vec::broadcast(1.f / 255.f);
      scale.store(m.hidden_scale + at);
      const Vec inverse = reciprocal(scale);
      for (int64_t k = 0; k < chunk; k += 4) {
        const auto scaled = [&](int i) {
          return (gelu_bfloat16(Vec::load(m.before + (k + i) * kTokens + at)) + shift) * inverse;
        };
        put_bytes(Gemm::at(m.hidden, k, at), scaled(0), scaled(1), scaled(2), scaled(3), AllLanes{});
      }
    }
  }

  // sums = or += W2 hidden for one panel and the chunk at h0. After the last chunk the channels are finished.
  void second_product(int64_t h0, int64_t chunk, int64_t panel, int vectors, const Span* spans_end,
                      const Memory& m) const {
    const bool final = h0 + chunk >= args.hidden;
    const float* scales = w2.scale(h0);
    const Span* from = m.spans;
    while (final && from->panel < panel) ++from;
    const Span* to = from;
    while (final && to < spans_end && to->panel == panel) ++to;
    for (int64_t row = 0; row < args.channels; row += Gemm::kRows) {
      if (final) this->prefetch_x(from, to, row);
      multiply_int8(vectors, w2.at(h0, row), chunk, m.hidden, chunk, m.whole);
      for (int vector = 0; vector < vectors; ++vector)
        second_sums(scales + row, row, panel * Gemm::kVectors + vector, h0 == 0, m);
      for (int64_t c = row; final && c < row + Gemm::kRows; ++c)
        this->finish(from, to, c, m.sums + (panel * rows2 + c) * kTokens, m);
    }
  }

  // Adds the sums of rows [row, row + kRows), or begins with the biases, for one vector of the task.
  [[gnu::noinline]] void second_sums(const float* scales, int64_t row, int64_t vector, bool begins,
                                     const Memory& m) const {
    const int64_t token = vector * Vec::kLanes, at = token % kTokens;
    const int32_t* whole = m.whole + at;
    float* sum = m.sums + (token - at) * rows2 + row * kTokens + at;
    const Vec step = Vec::load(m.hidden_scale + at);
    const auto add = [&](auto before) {
      for (int i = 0; i < Gemm::kRows; ++i) {
        fma(Vec::broadcast(scales[i]), step * load_whole(whole), before()).store(sum);
        whole += kTokens;
        sum += kTokens;
      }
    };
    if (!begins) {
      add([&] { return Vec::load(sum); });
      return;
    }
    const Ints image = Ints::load(m.lanes + token);
    const float* bias = bias2 + row * pitch + m.images[vector] - pitch;
    add([&] { return lookup(bias += pitch, image); });
  }

  void run_task(int64_t task) {
    const int64_t first = tasks.first(task), last = tasks.first(task + 1);
    if (first == last) return;
    const int64_t bytes = memory(nullptr).bytes;
    void* base = cpu::thread_scratch(bytes);
    if (!base) {
      this->missing_bytes.store(bytes);
      return;
    }
    const Memory m = memory(base);
    const Panels cut = panels_of<Gemm>(tasks.tiles, first, last);
    const int spans = cut_spans(cut, m.spans);
    find_images(spans, m);
    clear_ragged(cut, m);
    if (args.per_position)
      normalise_positions(spans, m);
    else
      normalise(spans, m);
    RowPrefetcher next_x = this->prefetcher_of_x(last, cut.tokens);
    for (int64_t h0 = 0; h0 < args.hidden; h0 += choice.hidden_chunk) {
      const int64_t chunk = w2.length(h0);
      for (int64_t p = 0; p < cut.count; ++p) {
        const int vectors = vectors_in(cut, p);
        first_product(h0, chunk, p, vectors, next_x, m);
        bytes_of_hidden(chunk, vectors, m);
        second_product(h0, chunk, p, vectors, m.spans + spans, m);
      }
    }
    if (args.moments_out)
      moments_of_tiles(static_cast<const T*>(args.out), tasks.tiles, first, last, args.channels, 0, args.channels,
                       partial);
  }

  // The products read whole vectors: the bytes past the last token must be there, though nothing of them is kept.
  void clear_ragged(const Panels& cut, const Memory& m) const {
    const int64_t last = cut.count - 1;
    if (cut.length(last) == kTokens) return;
    std::memset(m.z + last * kTokens * depth1, 0, static_cast<size_t>(kTokens * depth1));
  }

  static void run_tasks(int64_t begin, int64_t end, void* context) {
    for (int64_t task = begin; task < end; ++task) static_cast<BlockInt8*>(context)->run_task(task);
  }

  // W1's rows [begin, end): bytes, the bias for each image, and an estimate of the hidden channels' means.
  static void run_first_weights(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<BlockInt8*>(context);
    const int64_t channels = self.args.channels, hidden = self.args.hidden, batch = self.args.batch;
    with_values(self.w1.from, [&](const auto* matrix) {
      for (int64_t row = begin; row < end; ++row) {
        if (!find_scales(matrix + row * channels, self.w1, row)) self.w1.bad_row.store(row);
        for (int64_t image = 0; image < batch; image += Vec::kLanes) {
          const int count = static_cast<int>(batch - image < Vec::kLanes ? batch - image : Vec::kLanes);
          Vec dots;
          const float square = quantise_row<false>(matrix + row * channels, self.w1, row,
                                                   self.means.z_mean + image * channels, channels, count, &dots);
          const Vec bias = dots + Vec::broadcast(self.plain_bias1[row]);
          bias.store_n(self.bias1 + row * self.pitch + image, count);
          float mean[Vec::kLanes];
          mean_of_gelu(bias, Vec::load_n(self.means.z_spread + image, count) * Vec::broadcast(std::sqrt(square)))
              .store(mean);
          for (int i = 0; i < count; ++i) self.hidden_mean[(image + i) * hidden + row] = mean[i];
        }
      }
    });
  }

  // W2's rows [begin, end): bytes and the bias for each image, which also takes kGeluShift back.
  static void run_second_weights(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<BlockInt8*>(context);
    const int64_t channels = self.args.channels, hidden = self.args.hidden, batch = self.args.batch;
    with_values(self.w2.from, [&](const auto* matrix) {
      for (int64_t row = begin; row < end; ++row) {
        if (!find_scales(matrix + row * hidden, self.w2, row)) self.w2.bad_row.store(row);
        for (int64_t image = 0; image < batch; image += Vec::kLanes) {
          const int count = static_cast<int>(batch - image < Vec::kLanes ? batch - image : Vec::kLanes);
          Vec dots;
          quantise_row<true>(matrix + row * hidden, self.w2, row, self.hidden_mean + image * hidden, hidden, count,
                             &dots);
          float bias = self.plain_bias2[row];
          for (int64_t at = row; at < self.w2.chunks() * channels; at += channels)
            bias -= kGeluShift * self.w2.scales[at] * self.w2.sums[at];
          (dots + Vec::broadcast(bias)).store_n(self.bias2 + row * self.pitch + image, count);
        }
      }
    });
  }

  int64_t run() {
    const int64_t channels = args.channels, hidden = args.hidden;
    const int64_t map_floats = args.per_position ? 4 * channels : args.batch * ImageMap::floats(channels);
    Arena arena{nullptr};
    float *zeros, *scale2;
    const auto take = [&] {
      zeros = arena.take<float>(channels);
      scale2 = arena.take<float>(channels);
      plain_bias1 = arena.take<float>(hidden);
      plain_bias2 = arena.take<float>(channels);
      maps = arena.take<float>(map_floats);
      partial = arena.take<float>(args.moments_out ? tasks.tiles.count() * 2 * channels : 0);
      means.take(arena, args, tasks.tiles);
      bias1 = arena.take<float>(hidden * pitch);
      bias2 = arena.take<float>(channels * pitch);
      hidden_mean = arena.take<float>(args.batch * hidden);
      w1.take(arena);
      w2.take(arena);
    };
    take();
    // Kept from call to call: it is too much to be had anew from the operating system each time.
    const int64_t bytes = arena.used;
    void* base = cpu::thread_scratch(bytes, 1);
    if (!base) return bytes;
    arena = {static_cast<char*>(base)};
    take();
    for (int64_t c = 0; c < channels; ++c) zeros[c] = 0;
    read_all(args.layer_scale_2, channels, 1, scale2);
    read_all(args.fc1_bias, hidden, 0, plain_bias1);
    read_all(args.fc2_bias, channels, 0, plain_bias2);
    this->fc2_bias = zeros;  // bias2 is where the sums begin
    this->layer_scale_2 = scale2;
    if (args.per_position) {
      this->fill_position_maps();
      means.from_positions(*this);
    } else {
      args.pool.run(args.batch, &Base::run_maps, static_cast<Base*>(this));
      means.from_maps(args, maps);
    }
    args.pool.run(hidden, &run_first_weights, this);
    args.pool.run(channels, &run_second_weights, this);
    if (w1.bad_row.load() >= 0) return cpu::not_finite(0, w1.bad_row.load());
    if (w2.bad_row.load() >= 0) return cpu::not_finite(1, w2.bad_row.load());
    args.pool.run(tasks.count, &run_tasks, this);
    if (this->missing_bytes.load() == 0 && args.moments_out)
      merge_all(args.pool, partial, tasks.tiles, channels, args.moments_out);
    return this->missing_bytes.load();
  }
};

}  // namespace riformer::RIFORMER_ISA
