// Class scores: the final norm, the average over the positions, the linear layer. With GroupNorm the average of the
// normed tokens is (mean - mu) rstd gamma + beta, which follows from the moments alone.
#pragma once

#include "launch.h"
#include "statistics.h"

namespace riformer::cuda {

constexpr int kHeadThreads = 256, kHeadWarps = kHeadThreads / kWarp;
constexpr int kPoolRows = 32;
constexpr int64_t kMostHeadShared = 96 * 1024;

struct PoolArgs {
  const void* x;  // [B, N, C]
  float* sums;    // [B, tiles, C]
  int64_t positions;
  int channels;
  float eps;
};

// For LayerNorm: sums (x - mean) rstd over tiles of 32 rows. A thread block takes a tile. First it takes the statistics
// of the rows. Then each thread keeps to one piece of the columns and sums every `step`-th row; the threads of a column
// are added upwards. Shared memory: three floats per row, then [step, columns] float32, at most 8 KB. x comes from
// memory once; the later passes find the tile (48 KB for 768 channels of 16 bits) in the nearest cache.
template <class T, int Lanes>
RIFORMER_KERNEL(kHeadThreads, 2)
pool_kernel(RIFORMER_GRID_CONSTANT PoolArgs args) {
  constexpr int kValues = kPerPiece<T>;
  auto* const statistics = reinterpret_cast<PositionStatistics*>(shared_memory());
  float* const parts = reinterpret_cast<float*>(statistics + kPoolRows);
  const int64_t tiles = ceil_divide(args.positions, kPoolRows), image = thread_block_index() / tiles;
  const int64_t start = (thread_block_index() - image * tiles) * kPoolRows, left = args.positions - start;
  const int rows = static_cast<int>(left < kPoolRows ? left : kPoolRows), channels = args.channels;
  const T* const x = static_cast<const T*>(args.x) + (image * args.positions + start) * channels;
  tile_statistics<T, Lanes>(x, rows, channels, args.eps, statistics, kHeadThreads);
  const TileShare share(channels / kValues, kHeadThreads);
  const int width = share.span * kValues;
  for (int base = 0; base < channels; base += width) {
    const int column = share.piece * kValues, c = base + column;
    if (!share.idle() && c < channels) {
      float sums[kValues] = {}, values[kValues];
      for (int row = share.row; row < rows; row += share.step) {
        const PositionStatistics of = statistics[row];
        unpack_piece<T>(load_16(x + static_cast<int64_t>(row) * channels + c), values);
        RIFORMER_UNROLL
        for (int i = 0; i < kValues; ++i) sums[i] = multiply_add((values[i] - of.first) - of.shift, of.rstd, sums[i]);
      }
      RIFORMER_UNROLL
      for (int i = 0; i < kValues; ++i) parts[share.row * width + column + i] = sums[i];
    }
    sync_thread_block();
    for (int i = thread_index(); i < width && base + i < channels; i += kHeadThreads) {
      float sum = 0.f;
      for (int part = 0; part < share.step; ++part) sum += parts[part * width + i];
      args.sums[thread_block_index() * channels + base + i] = sum;
    }
    sync_thread_block();
  }
}

struct HeadKernelArgs {
  const float* source;  // moments [B, 2, C], or the sums [B, tiles, C] of pool_kernel
  Parameter norm_weight, norm_bias, fc_weight, fc_bias;
  void* out;
  DType out_dtype;
  int64_t batch, positions, tiles, classes;
  int channels;
  int rounds;  // of kHeadWarps * Classes classes, which a thread block goes through
  float eps;
  bool per_position;
  bool aligned;  // whether the rows of the weight are on 16-byte boundaries
};

// Adds each of P values over the lanes of a warp, by the butterfly 16, 8, 4, 2, 1. As long as a lane has several
// values, it gives half of them to the lane that it adds with. In the end lane l has the sum of value l P / 32.
template <int P>
RIFORMER_DEVICE float scattered_sum(float (&values)[P]) {
  const int lane = thread_index() % kWarp;
  int count = P;
  RIFORMER_UNROLL
  for (int mask = kWarp / 2; mask; mask /= 2) {
    if (count > 1) {
      count /= 2;
      RIFORMER_UNROLL
      for (int i = 0; i < P / 2; ++i) {
        if (i >= count) continue;
        const float given = lane & mask ? values[i] : values[i + count];
        const float kept = lane & mask ? values[i + count] : values[i];
        values[i] = kept + shuffle_xor(given, mask);
      }
    } else {
      values[0] += shuffle_xor(values[0], mask);
    }
  }
  return values[0];
}

// Where channel c of an image's features lies. Lanes read eight channels each, 16 bytes at a time. The first four of
// all eights lie together, and so do the last four, so that lanes next to each other read from different banks.
template <int Values>
RIFORMER_DEVICE int feature_place(int c, int channels) {
  return Values == 8 ? c % 8 / 4 * (channels / 2) + c / 8 * 4 + c % 4 : c;
}

// Computes the scores of `Images` images. First their features, which are the pooled normed tokens: [Images, C] float32
// in shared memory, from the moments or from the sums of pool_kernel. Then each warp takes `Classes` classes at a time.
// A lane sums the products of every 32nd piece of the weight's rows, and a butterfly adds the lanes. So the sum of a
// score has one order, whatever images and classes are computed beside it.
//
// One image (1000 classes of 512 channels) is bound by latency, as all warps start at once. With eight images a weight
// is read once for all of them; then shared memory and multiply-adds take the same time, 30 us at a batch of 1024.
template <class W, int Classes, int Images>
RIFORMER_KERNEL(kHeadThreads, 2)
head_kernel(RIFORMER_GRID_CONSTANT HeadKernelArgs args) {
  constexpr int kValues = kPerPiece<W>, kShare = kHeadWarps / Images, kPairs = Classes * Images;
  float* const features = reinterpret_cast<float*>(shared_memory());
  const int channels = args.channels, warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const int64_t groups = ceil_divide(args.classes, int64_t{kHeadWarps} * Classes * args.rounds);
  const int64_t first_image = thread_block_index() / groups * Images, group = thread_block_index() % groups;

  // The features.
  const int64_t image = first_image + warp / kShare;
  if (image < args.batch) {
    float* const mine = features + warp / kShare * channels;
    const int from = warp % kShare * kWarp + lane;
    if (args.per_position) {
      const float* const sums = args.source + image * args.tiles * channels;
      for (int c = from; c < channels; c += kShare * kWarp) {
        float sum = 0.f;
        for (int64_t tile = 0; tile < args.tiles; ++tile) sum += sums[tile * channels + c];
        const float average = sum / static_cast<float>(args.positions);
        mine[feature_place<kValues>(c, channels)] =
            multiply_add(average, load_parameter(args.norm_weight, c), load_parameter(args.norm_bias, c));
      }
    } else {
      const float* const moments = args.source + image * 2 * channels;
      WarpTeam team;
      const ImageStatistics of = image_statistics(
          team, [&](int c) { return moments[c]; }, [&](int c) { return moments[channels + c]; }, moments[0], channels,
          args.positions, args.eps);
      for (int c = from; c < channels; c += kShare * kWarp)
        mine[feature_place<kValues>(c, channels)] =
            multiply_add((moments[c] - of.first) - of.shift, of.rstd * load_parameter(args.norm_weight, c),
                         load_parameter(args.norm_bias, c));
    }
  }
  sync_thread_block();

  // The scores.
  RIFORMER_NO_UNROLL
  for (int round = 0; round < args.rounds; ++round) {
    const int64_t first_class = ((group * args.rounds + round) * kHeadWarps + warp) * Classes;
    if (first_class >= args.classes) break;
    float sums[kPairs] = {};
    for (int piece = lane; piece < channels / kValues; piece += kWarp) {
      float weights[Classes][kValues];
      RIFORMER_UNROLL
      for (int k = 0; k < Classes; ++k) {
        // Behind the last class the last one is computed again, and not stored.
        const int64_t row = first_class + k < args.classes ? first_class + k : args.classes - 1;
        const W* const from = static_cast<const W*>(args.fc_weight.data) + row * channels + piece * kValues;
        if (args.aligned) {
          unpack_piece<W>(load_16(from), weights[k]);
        } else {
          RIFORMER_UNROLL
          for (int i = 0; i < kValues; ++i) weights[k][i] = to_float(from[i]);
        }
      }
      RIFORMER_UNROLL
      for (int j = 0; j < Images; ++j) {
        RIFORMER_UNROLL
        for (int half = 0; half < kValues / 4; ++half) {
          float feature[4];
          unpack_piece<float>(load_16(features + j * channels + half * (channels / 2) + piece * 4), feature);
          RIFORMER_UNROLL
          for (int k = 0; k < Classes; ++k) {
            RIFORMER_UNROLL
            for (int i = 0; i < 4; ++i)
              sums[k * Images + j] = multiply_add(weights[k][4 * half + i], feature[i], sums[k * Images + j]);
          }
        }
      }
    }
    const float sum = scattered_sum(sums);
    const int pair = lane * kPairs / kWarp;
    const int64_t scored = first_class + pair / Images, of = first_image + pair % Images;
    if (lane % (kWarp / kPairs) != 0 || scored >= args.classes || of >= args.batch) continue;
    const float score = args.fc_bias.data ? sum + load_parameter(args.fc_bias, scored) : sum;
    const int64_t at = of * args.classes + scored;
    with_dtype_on_device(args.out_dtype, [&](auto element) {
      using Out = decltype(element);
      static_cast<Out*>(args.out)[at] = from_float<Out>(score);
    });
  }
}

inline int64_t pool_sums_count(const HeadArgs& args) {
  return args.per_position ? args.batch * ceil_divide(args.positions, kPoolRows) * args.channels : 0;
}

template <class T>
void launch_pool(const HeadArgs& args, float* sums) {
  const PoolArgs pool{args.x, sums, args.positions, static_cast<int>(args.channels), args.eps};
  const Launch how{"pool",
                   args.batch * ceil_divide(args.positions, kPoolRows),
                   kHeadThreads,
                   kPoolRows * static_cast<int64_t>(sizeof(PositionStatistics)) + kHeadThreads * kPerPiece<T> * 4,
                   1,
                   args.device.stream};
  if (row_form(args.channels, sizeof(T)) == RowForm::narrow)
    launch(pool_kernel<T, 8>, how, pool);
  else
    launch(pool_kernel<T, 32>, how, pool);
}

template <class W, int Classes, int Images>
void launch_scores(HeadKernelArgs args, const Device& device) {
  const int64_t images = ceil_divide(args.batch, Images), groups = ceil_divide(args.classes, kHeadWarps * Classes);
  // Several rounds with the same features, as long as every multiprocessor has four thread blocks.
  const int64_t rounds = images * groups / (4 * device.processors);
  args.rounds = static_cast<int>(rounds < 1 ? 1 : rounds > 8 ? 8 : rounds);
  const int64_t thread_blocks = images * ceil_divide(args.classes, int64_t{kHeadWarps} * Classes * args.rounds);
  const int64_t shared = int64_t{Images} * args.channels * 4;
  if (shared > kMostHeadShared)
    throw std::runtime_error("riformer: head: " + std::to_string(args.channels) + " channels, at most 24576 fit");
  launch(head_kernel<W, Classes, Images>, {"head", thread_blocks, kHeadThreads, shared, 1, device.stream}, args);
}

template <class W>
void launch_head_of(const HeadKernelArgs& args, const Device& device) {
  if (args.batch > 8 && 8 * int64_t{args.channels} * 4 <= kMostHeadShared)
    launch_scores<W, 4, 8>(args, device);
  else
    launch_scores<W, 1, 1>(args, device);
}

inline void launch_head(const HeadArgs& args) {
  float* const sums = static_cast<float*>(args.workspace);
  check_dtypes({args.norm_weight.dtype, args.norm_bias.dtype, args.fc_bias.dtype, args.out_dtype});
  if (args.per_position)
    with_served_dtype(args.dtype, [&](auto element) { launch_pool<decltype(element)>(args, sums); });
  const HeadKernelArgs kernel{args.per_position ? sums : args.moments,
                              args.norm_weight,
                              args.norm_bias,
                              args.fc_weight,
                              args.fc_bias,
                              args.out,
                              args.out_dtype,
                              args.batch,
                              args.positions,
                              ceil_divide(args.positions, kPoolRows),
                              args.classes,
                              static_cast<int>(args.channels),
                              1,
                              args.eps,
                              args.per_position,
                              reinterpret_cast<uintptr_t>(args.fc_weight.data) % 16 == 0};
  with_served_dtype(args.fc_weight.dtype,
                    [&](auto element) { launch_head_of<decltype(element)>(kernel, args.device); });
}

}  // namespace riformer::cuda
