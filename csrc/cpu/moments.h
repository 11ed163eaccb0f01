// Moments: taken per tile from what was stored, merged in the order of the tiles.
#pragma once

#include "tiles.h"

namespace riformer::RIFORMER_ISA {

// Mean and centred sum of squares of `n` contiguous values, in two passes: E[x^2] - E[x]^2 would lose everything where
// the mean is much larger than the spread.
template <class T>
inline void row_moments(const T* row, int64_t n, float* mean, float* centred) {
  Vec total = Vec::zero();
  for (int64_t j = 0; j < n; j += Vec::kLanes) total = total + Vec::load_n(row + j, static_cast<int>(n - j));
  const float average = total.sum() / static_cast<float>(n);
  const Vec centre = Vec::broadcast(average);
  Vec square = Vec::zero();
  for (int64_t j = 0; j < n; j += Vec::kLanes) {
    const int lanes = static_cast<int>(n - j < Vec::kLanes ? n - j : Vec::kLanes);
    const Vec difference = keep_n(Vec::load_n(row + j, lanes) - centre, lanes);
    square = fma(difference, difference, square);
  }
  *mean = average;
  *centred = square.sum();
}

// partial is [tile][2][channels] over all tiles of the batch.
template <class T>
inline void tile_moments(const T* tokens, const Tiles& tiles, int64_t tile, int64_t channels, float* partial) {
  const T* base = tokens + tiles.image(tile) * channels * tiles.positions + tiles.start(tile);
  float* mean = partial + tile * 2 * channels;
  const int64_t length = tiles.length(tile);
  for (int64_t c = 0; c < channels; ++c) row_moments(base + c * tiles.positions, length, mean + c, mean + channels + c);
}

// Chan, Golub and LeVeque's update, tile after tile, for all channels of one image. In double: after some hundred tiles
// a tile's share of the difference is below a float32 mean's last digit, and the mean would stand still.
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
    for (int64_t tile = begin; tile < end; ++tile) tile_moments(task.x, *task.tiles, tile, task.channels, task.partial);
  }
};

// Memory of one call, freed at its end.
struct Buffer {
  void* data;
  explicit Buffer(int64_t bytes) : data(std::malloc(static_cast<size_t>(bytes > 0 ? bytes : 1))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
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
  if (args.dtype == DType::f32) return moments_of<float>(args);
  if (args.dtype == DType::bf16) return moments_of<bf16>(args);
  return moments_of<f16>(args);
}

}  // namespace riformer::RIFORMER_ISA
