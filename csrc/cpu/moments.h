// Moments: taken per tile from what was stored, merged in the order of the tiles.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "lanes.h"
#include "memory.h"
#include "tiles.h"

namespace riformer::RIFORMER_ISA {

using cpu::Pool;

// The mean and the centred sum of squares of `count` <= kLanes rows of `n` values, `stride` apart. Lane i belongs to
// row i. Takes two passes: E[x^2] - E[x]^2 would lose everything where the mean is much larger than the spread, and one
// pass of sums about each row's first value lost up to twice what rounding allows (measured).
template <class T>
inline void moments_of_rows(const T* from, int64_t stride, int count, int64_t n, float* mean, float* centred) {
  Vec sums[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) sums[i] = Vec::zero();
  for (int i = 0; i < count; ++i)
    for_each_vector(n, [&](int64_t j, auto lanes) { sums[i] = sums[i] + load(from + i * stride + j, lanes); });
  alignas(64) float average[Vec::kLanes];
  const Vec means = lane_sums(sums) * Vec::broadcast(1.f / static_cast<float>(n));
  means.store(average);
  for (int i = 0; i < count; ++i) {
    const Vec centre = Vec::broadcast(average[i]);
    Vec square = Vec::zero();
    for_each_vector(n, [&](int64_t j, auto lanes) {
      const Vec difference = keep(load(from + i * stride + j, lanes) - centre, lanes);
      square = fma(difference, difference, square);
    });
    sums[i] = square;
  }
  means.store_n(mean, count);
  lane_sums(sums).store_n(centred, count);
}

// The moments of channels [begin, end_channel) of tiles [first, last). `partial` is [tile][2][channels] over all tiles
// of the batch. Goes through all tiles of an image for one vector of channels before the next, so that long rows are
// read.
template <class T>
inline void moments_of_tiles(const T* tokens, const Tiles& tiles, int64_t first, int64_t last, int64_t channels,
                             int64_t begin, int64_t end_channel, float* partial) {
  while (first < last) {
    const int64_t image = tiles.image(first);
    const int64_t end = (image + 1) * tiles.per_image < last ? (image + 1) * tiles.per_image : last;
    for (int64_t c = begin; c < end_channel; c += Vec::kLanes) {
      const int count = static_cast<int>(end_channel - c < Vec::kLanes ? end_channel - c : Vec::kLanes);
      const T* row = tokens + (image * channels + c) * tiles.positions;
      for (int64_t tile = first; tile < end; ++tile) {
        float* mean = partial + tile * 2 * channels + c;
        moments_of_rows(row + tiles.start(tile), tiles.positions, count, tiles.length(tile), mean, mean + channels);
      }
    }
    first = end;
  }
}

// Merges the tiles of one image, one after the other, by Chan, Golub and LeVeque's update. In double: after some
// hundred tiles one tile moves the mean by less than float32's last digit, and a float32 mean would stand still.
inline void merge_moments(const float* partial, const Tiles& tiles, int64_t image, int64_t channels, float* moments) {
  constexpr int64_t kGroup = 16;
  const float* first = partial + image * tiles.per_image * 2 * channels;
  for (int64_t c = 0; c < channels; c += kGroup) {
    const int n = static_cast<int>(channels - c < kGroup ? channels - c : kGroup);
    double mean[kGroup], centred[kGroup];
    for (int i = 0; i < n; ++i) mean[i] = first[c + i];
    for (int i = 0; i < n; ++i) centred[i] = first[channels + c + i];
    double seen = static_cast<double>(tiles.length(0));
    for (int64_t tile = 1; tile < tiles.per_image; ++tile) {
      const float* next = first + tile * 2 * channels + c;
      const double length = static_cast<double>(tiles.length(tile));
      const double share = length / (seen + length);
      for (int i = 0; i < n; ++i) {
        const double delta = next[i] - mean[i];
        mean[i] += delta * share;
        centred[i] += next[channels + i] + delta * delta * (seen * share);
      }
      seen += length;
    }
    float* out = moments + image * 2 * channels + c;
    for (int i = 0; i < n; ++i) out[i] = static_cast<float>(mean[i]);
    for (int i = 0; i < n; ++i) out[channels + i] = static_cast<float>(centred[i]);
  }
}

struct MergeTask {
  const float* partial;
  const Tiles* tiles;
  int64_t channels;
  float* moments;

  static void run(int64_t begin, int64_t end, void* context) {
    const auto& task = *static_cast<const MergeTask*>(context);
    for (int64_t image = begin; image < end; ++image)
      merge_moments(task.partial, *task.tiles, image, task.channels, task.moments);
  }
};

inline void merge_all(const Pool& pool, const float* partial, const Tiles& tiles, int64_t channels, float* moments) {
  MergeTask task{partial, &tiles, channels, moments};
  pool.run(tiles.batch, &MergeTask::run, &task);
}

template <class T>
struct MomentsTask {
  const T* x;
  const Tiles* tiles;
  int64_t channels;
  float* partial;

  static void run(int64_t begin, int64_t end, void* context) {
    const auto& task = *static_cast<const MomentsTask*>(context);
    moments_of_tiles(task.x, *task.tiles, begin, end, task.channels, 0, task.channels, task.partial);
  }
};

inline int64_t partial_bytes(const Tiles& tiles, int64_t channels) {
  return tiles.count() * 2 * channels * static_cast<int64_t>(sizeof(float));
}

template <class T>
int64_t moments_of(const cpu::MomentsArgs& args) {
  const Tiles tiles(args.batch, args.positions);
  const Buffer partial(partial_bytes(tiles, args.channels));
  if (!partial.data) return partial_bytes(tiles, args.channels);
  MomentsTask<T> task{static_cast<const T*>(args.x), &tiles, args.channels, static_cast<float*>(partial.data)};
  args.pool.run(tiles.count(), &MomentsTask<T>::run, &task);
  merge_all(args.pool, task.partial, tiles, args.channels, args.moments_out);
  return 0;
}

inline int64_t moments(const cpu::MomentsArgs& args) {
  return with_dtype(args.dtype, [&](auto element) { return moments_of<decltype(element)>(args); });
}

}  // namespace riformer::RIFORMER_ISA
