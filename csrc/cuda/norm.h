// The norm of tokens: GroupNorm from moments, or LayerNorm of each position.
#pragma once

#include "launch.h"
#include "statistics.h"

namespace riformer::cuda {

constexpr int kNormThreads = 256;
constexpr int kMostNormRows = 256;

struct NormKernelArgs {
  const void* x;         // [B, N, C]
  const float* moments;  // [B, 2, C]
  Parameter weight, bias;
  void* out;
  DType out_dtype;
  int64_t positions;
  int channels;
  int rows;  // of a tile
  float eps;
};

// A thread block norms a tile of one image's rows. First it takes the statistics: those of the image, which every
// thread block computes again from 8 bytes a channel, or those of each row. Then each thread keeps to one piece of the
// columns and goes down the rows. Shared memory: three floats per row and the 64 of ThreadBlockTeam. x is read and the
// result is written once. With LayerNorm the tile is read three times, but is small enough to stay in the nearest
// cache. Lanes: how many share a row for its statistics; 0 for GroupNorm.
template <class T, int Lanes>
RIFORMER_KERNEL(kNormThreads, 4)
norm_kernel(RIFORMER_GRID_CONSTANT NormKernelArgs args) {
  constexpr int kValues = kPerPiece<T>;
  auto* const statistics = reinterpret_cast<PositionStatistics*>(shared_memory());
  const int64_t tiles = ceil_divide(args.positions, args.rows);
  const int64_t image = thread_block_index() / tiles, start = (thread_block_index() - image * tiles) * args.rows;
  const int64_t left = args.positions - start, offset = (image * args.positions + start) * args.channels;
  const int rows = static_cast<int>(left < args.rows ? left : args.rows), channels = args.channels;
  const T* const x = static_cast<const T*>(args.x) + offset;
  // The statistics.
  PositionStatistics of_image{};
  if constexpr (Lanes == 0) {
    ThreadBlockTeam team{reinterpret_cast<float*>(statistics + kMostNormRows), kNormThreads};
    const float* const moments = args.moments + image * 2 * channels;
    const ImageStatistics found = image_statistics(
        team, [&](int c) { return moments[c]; }, [&](int c) { return moments[channels + c]; }, moments[0], channels,
        args.positions, args.eps);
    of_image = {found.mu, found.low, found.rstd};
  } else {
    tile_statistics<T, Lanes>(x, rows, channels, args.eps, statistics, kNormThreads);
  }
  // The norm, with the parameters of eight or four columns in registers.
  const TileShare share(channels / kValues, kNormThreads);
  if (share.idle()) return;
  for (int c = share.piece * kValues; c < channels; c += kNormThreads * kValues) {
    float gamma[kValues], beta[kValues];
    RIFORMER_UNROLL
    for (int i = 0; i < kValues; ++i) {
      gamma[i] = load_parameter(args.weight, c + i);
      beta[i] = load_parameter(args.bias, c + i);
    }
    for (int row = share.row; row < rows; row += share.step) {
      const PositionStatistics of = Lanes ? statistics[row] : of_image;
      const int64_t at = static_cast<int64_t>(row) * channels + c;
      float values[kValues];
      unpack_piece<T>(load_16(x + at), values);
      RIFORMER_UNROLL
      for (int i = 0; i < kValues; ++i)
        values[i] = multiply_add((values[i] - of.first) - of.shift, of.rstd * gamma[i], beta[i]);
      store_values(args.out, args.out_dtype, offset + at, values);
    }
  }
}

template <class T>
void launch_norm_of(const NormArgs& args) {
  // 32 KB of rows, so that GroupNorm's statistics are little beside them and LayerNorm's rows stay in the cache.
  const int64_t fitting = 32768 / (args.channels * static_cast<int64_t>(sizeof(T)));
  const int rows = static_cast<int>(fitting < 8 ? 8 : fitting > kMostNormRows ? kMostNormRows : fitting);
  const NormKernelArgs kernel{args.x,   args.moments,   args.weight,    args.bias,
                              args.out, args.out_dtype, args.positions, static_cast<int>(args.channels),
                              rows,     args.eps};
  const Launch how{"norm",
                   args.batch * ceil_divide(args.positions, rows),
                   kNormThreads,
                   kMostNormRows * static_cast<int64_t>(sizeof(PositionStatistics)) + ThreadBlockTeam::kFloats * 4,
                   1,
                   args.device.stream};
  if (!args.per_position)
    launch(norm_kernel<T, 0>, how, kernel);
  else if (row_form(args.channels, sizeof(T)) == RowForm::narrow)
    launch(norm_kernel<T, 8>, how, kernel);
  else
    launch(norm_kernel<T, 32>, how, kernel);
}

inline void launch_norm(const NormArgs& args) {
  check_dtypes({args.weight.dtype, args.bias.dtype, args.out_dtype});
  with_served_dtype(args.dtype, [&](auto element) { launch_norm_of<decltype(element)>(args); });
}

}  // namespace riformer::cuda
