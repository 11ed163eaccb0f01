// The maps of a block: everything that happens to a token before the first product, as a few numbers per image and
// channel.
//
// With xc = x - mu1 (mu1: the mean of the image, or with LayerNorm of the position) these are four numbers:
//
//     y = x + u xc + w          u = r1 ls1 gamma1',  w = ls1 beta1'
//     z = P xc + Q              P = (1 + u) r2 gamma2,  Q = (w - (mu2 - mu1)) r2 gamma2 + beta2
//
// gamma1' = gamma1 (s - 1) and beta1' = beta1 (s - 1) + t contain the token mixer's affine, whose scale is s and whose
// shift is t. mu2 and r2 are the statistics of y. They follow from the moments of x: with d and V the means of xc and
// the centred sums of squares, y has the means d (1 + u) + w relative to mu1, and the centred sums of squares (1 + u)^2
// V. Everything is relative to mu1, so that nothing cancels where the mean is large.
#pragma once

#include "launch.h"
#include "statistics.h"

namespace riformer::cuda {

// How many float32 values each result of launch_block_maps has.
inline int64_t maps_count(const BlockArgs& args) { return (args.per_position ? 1 : args.batch) * 5 * args.channels; }
inline int64_t statistics_count(const BlockArgs& args) {
  return args.per_position ? args.batch * args.positions * 4 : 0;
}
inline int64_t constants_count(const BlockArgs& args) { return args.hidden + 2 * args.channels; }

constexpr int kMapThreads = 256;
constexpr int64_t kConstantsPerThreadBlock = 4 * kMapThreads;

struct PrepareArgs {
  const float* moments;  // [B, 2, C]; null with LayerNorm
  float* maps;           // [B, 5, C]: u, w, P, Q, and mu1 for every channel;
                         // LayerNorm: [1, 5, C]: ls1 gamma1', ls1 beta1', gamma2, beta2, 0
  float* constants;      // fc1's bias [hidden], ls2 [C], ls2 times fc2's bias [C]; 0 and 1 for what is left out
  Parameter layer_scale_1, norm1_weight, norm1_bias, affine_weight, affine_bias;
  Parameter norm2_weight, norm2_bias, fc1_bias, fc2_bias, layer_scale_2;
  int64_t images;  // B, or 1 with LayerNorm
  int64_t positions;
  int channels, hidden;
  float eps1, eps2;
};

RIFORMER_DEVICE float constant_at(const PrepareArgs& args, int64_t index) {
  if (index < args.hidden) return args.fc1_bias.data ? load_parameter(args.fc1_bias, index) : 0.f;
  const int64_t c = (index - args.hidden) % args.channels;
  const float scale = args.layer_scale_2.data ? load_parameter(args.layer_scale_2, c) : 1.f;
  if (index < args.hidden + args.channels) return scale;
  return args.fc2_bias.data ? scale * load_parameter(args.fc2_bias, c) : 0.f;
}

// Writes the maps, a thread block for each image, and the constants, by the thread blocks behind those. A thread takes
// every 256th channel. What a later step needs of an earlier one its own thread reads back from `maps`, so the only
// barriers are those of the sums. Shared memory: the 64 floats of ThreadBlockTeam. The kernel moves 28 bytes per image
// and channel, a seventh of the block's own tokens at 7 x 7 and a 450th at 56 x 56, so its latency matters and not its
// bytes.
template <bool PerPosition>
RIFORMER_KERNEL(kMapThreads, 2)
prepare_kernel(RIFORMER_GRID_CONSTANT PrepareArgs args) {
  const int64_t image = thread_block_index();
  if (image >= args.images) {
    const int64_t all = args.hidden + 2 * static_cast<int64_t>(args.channels);
    const int64_t begin = (image - args.images) * kConstantsPerThreadBlock + thread_index();
    for (int64_t i = begin; i < begin + kConstantsPerThreadBlock && i < all; i += kMapThreads)
      args.constants[i] = constant_at(args, i);
    return;
  }

  // gamma1' and beta1', times ls1.
  const int channels = args.channels;
  float* const maps = args.maps + image * 5 * channels;
  for (int c = thread_index(); c < channels; c += kMapThreads) {
    float u = 0.f, w = 0.f;
    if (args.norm1_weight.data) {
      const float scale = load_parameter(args.layer_scale_1, c);
      float gamma = load_parameter(args.norm1_weight, c), beta = load_parameter(args.norm1_bias, c);
      if (args.affine_weight.data) {
        const float difference = load_parameter(args.affine_weight, c) - 1.f;
        gamma *= difference;
        beta *= difference;
        if (args.affine_bias.data) beta += load_parameter(args.affine_bias, c);
      }
      u = scale * gamma;
      w = scale * beta;
    }
    maps[c] = u;
    maps[channels + c] = w;
    if (PerPosition) {
      maps[2 * channels + c] = load_parameter(args.norm2_weight, c);
      maps[3 * channels + c] = load_parameter(args.norm2_bias, c);
      maps[4 * channels + c] = 0.f;
    }
  }
  if (PerPosition) return;

  // The statistics of x, from its moments.
  ThreadBlockTeam team{reinterpret_cast<float*>(shared_memory()), kMapThreads};
  const float* const moments = args.moments + image * 2 * channels;
  const auto mean = [&](int c) { return moments[c]; };
  const auto centred = [&](int c) { return moments[channels + c]; };
  const ImageStatistics of_x = image_statistics(team, mean, centred, moments[0], channels, args.positions, args.eps1);
  // The statistics of y, from its means `shifted` and its centred sums of squares `grown`.
  const auto gain = [&](int c) { return multiply_add(maps[c], of_x.rstd, 1.f); };
  const auto shifted = [&](int c) {
    return multiply_add((mean(c) - of_x.first) - of_x.shift, gain(c), maps[channels + c]);
  };
  const auto grown = [&](int c) { return gain(c) * gain(c) * centred(c); };
  float sum = 0.f;
  for (int c = team.index; c < channels; c += team.size) sum += shifted(c);
  const float first = team.sum(sum) / static_cast<float>(channels);
  const ImageStatistics of_y = image_statistics(team, shifted, grown, first, channels, args.positions, args.eps2);
  // u, w, P and Q.
  for (int c = thread_index(); c < channels; c += kMapThreads) {
    const float u = maps[c] * of_x.rstd, w = maps[channels + c], grow = 1.f + u;
    const float p = of_y.rstd * load_parameter(args.norm2_weight, c);
    // The kernels subtract mu rounded to float32. w and Q make up for the rounding error, `low`.
    maps[c] = u;
    maps[channels + c] = multiply_add(-of_x.low, u, w);
    maps[2 * channels + c] = grow * p;
    maps[3 * channels + c] = multiply_add((w - of_y.mu) - of_x.low * grow, p, load_parameter(args.norm2_bias, c));
    maps[4 * channels + c] = of_x.mu;
  }
}

struct PositionArgs {
  const void* x;      // tokens [rows, C]
  const float* maps;  // [1, 5, C] of prepare_kernel
  float* statistics;  // [rows, 4]: mean and rstd of x, mean of y relative to that of x, rstd of y
  int64_t rows;
  int channels;
  float eps1, eps2;
};

constexpr int kPositionThreads = 256;

// LayerNorm's statistics, of each row of x and of each row of y = x + u (x - mean) rstd + w. A row is shared by 8 or 32
// lanes, which keep it in registers unless it is among the widest. x is read once. u and w come from the nearest cache:
// they are four times the bytes of x in 16 bits, which at 4.3 TB/s of x is 80 of the 128 bytes a cycle that it gives.
template <class T, int Lanes, int Held>
RIFORMER_KERNEL(kPositionThreads, 2)
position_kernel(RIFORMER_GRID_CONSTANT PositionArgs args) {
  const int64_t row = thread_block_index() * (kPositionThreads / Lanes) + thread_index() / Lanes;
  const bool inside = row < args.rows;
  const int channels = args.channels;
  const Row<T, Lanes, Held> x(static_cast<const T*>(args.x) + (inside ? row : 0) * channels,
                              inside ? channels / kPerPiece<T> : 0);
  const PositionStatistics of_x = position_statistics(x, channels, args.eps1);
  const float *const u = args.maps, *const w = args.maps + channels;
  const auto second = [&](float value, float gain, float offset) {
    const float d = (value - of_x.first) - of_x.shift;
    return d + multiply_add(gain, d * of_x.rstd, offset);
  };
  const auto visit_pairs = [&](const auto& visit) {
    x.each([&](int c, const float (&value)[kPerPiece<T>]) {
      RIFORMER_UNROLL
      for (int i = 0; i < kPerPiece<T>; i += 4) {
        float gain[4], offset[4];
        unpack_piece<float>(load_16(u + c + i), gain);
        unpack_piece<float>(load_16(w + c + i), offset);
        RIFORMER_UNROLL
        for (int j = 0; j < 4; ++j) visit(second(value[i + j], gain[j], offset[j]));
      }
    });
  };
  const float first = second(of_x.first, u[0], w[0]);
  float sum = 0.f, squares = 0.f;
  visit_pairs([&](float y) { sum += y - first; });
  const float shift = lane_sum<Lanes>(sum) / static_cast<float>(channels);
  visit_pairs([&](float y) {
    const float d = (y - first) - shift;
    squares = multiply_add(d, d, squares);
  });
  const float variance = lane_sum<Lanes>(squares) / static_cast<float>(channels);
  if (inside && thread_index() % Lanes == 0) {
    float* const target = args.statistics + 4 * row;
    target[0] = of_x.first + of_x.shift;
    target[1] = of_x.rstd;
    target[2] = first + shift;
    target[3] = 1.f / sqrtf(variance + args.eps2);
  }
}

template <class T>
void launch_positions(const PositionArgs& args, const Device& device) {
  const auto start = [&](auto kernel, int lanes) {
    const int64_t thread_blocks = ceil_divide(args.rows, kPositionThreads / lanes);
    launch(kernel, {"position statistics", thread_blocks, kPositionThreads, 0, 1, device.stream}, args);
  };
  const RowForm form = row_form(args.channels, sizeof(T));
  if (form == RowForm::narrow) start(position_kernel<T, 8, 5>, 8);
  if (form == RowForm::wide) start(position_kernel<T, 32, 6>, 32);
  if (form == RowForm::any) start(position_kernel<T, 32, 0>, 32);
}

// The buffers have the sizes above and are 16-byte aligned. `statistics` is written only with per_position.
inline void launch_block_maps(const BlockArgs& args, float* maps, float* statistics, float* constants) {
  check_dtypes({args.layer_scale_1.dtype, args.norm1_weight.dtype, args.norm1_bias.dtype, args.affine_weight.dtype,
                args.affine_bias.dtype, args.norm2_weight.dtype, args.norm2_bias.dtype, args.fc1_bias.dtype,
                args.fc2_bias.dtype, args.layer_scale_2.dtype});
  const int64_t images = args.per_position ? 1 : args.batch;
  const PrepareArgs prepare{args.moments,
                            maps,
                            constants,
                            args.layer_scale_1,
                            args.norm1_weight,
                            args.norm1_bias,
                            args.affine_weight,
                            args.affine_bias,
                            args.norm2_weight,
                            args.norm2_bias,
                            args.fc1_bias,
                            args.fc2_bias,
                            args.layer_scale_2,
                            images,
                            args.positions,
                            static_cast<int>(args.channels),
                            static_cast<int>(args.hidden),
                            args.eps1,
                            args.eps2};
  const Launch how{"block maps",
                   images + ceil_divide(constants_count(args), kConstantsPerThreadBlock),
                   kMapThreads,
                   ThreadBlockTeam::kFloats * 4,
                   1,
                   args.device.stream};
  launch(args.per_position ? prepare_kernel<true> : prepare_kernel<false>, how, prepare);
  if (!args.per_position) return;
  const PositionArgs positions{
      args.x, maps, statistics, args.batch * args.positions, static_cast<int>(args.channels), args.eps1, args.eps2};
  with_served_dtype(args.dtype, [&](auto element) { launch_positions<decltype(element)>(positions, args.device); });
}

}  // namespace riformer::cuda
