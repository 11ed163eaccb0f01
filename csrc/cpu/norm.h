// The norm of a feature map, its statistics taken from the moments (GroupNorm) or from each position (LayerNorm).
#pragma once

#include <cstdint>

#include "lanes.h"
#include "memory.h"
#include "norm_map.h"
#include "tiles.h"

namespace riformer::RIFORMER_ISA {

template <class X, class T>
struct NormKernel {
  const cpu::NormArgs& args;
  Tiles tiles;
  // Per image: the centre, padded to 16 floats, then scale and shift [channels]. With per_position once for all images:
  // weight and bias [channels].
  float* maps = nullptr;

  int64_t map_floats() const { return 16 + 2 * args.channels; }

  void make_map(int64_t image) const {
    const int64_t channels = args.channels;
    const float* mean = args.moments + image * 2 * channels;
    double mu, rstd;
    image_statistics(
        channels, args.positions, args.eps, [&](int64_t c) { return static_cast<double>(mean[c]); },
        [&](int64_t c) { return static_cast<double>(mean[channels + c]); }, &mu, &rstd);
    float* map = maps + image * map_floats();
    map[0] = static_cast<float>(mu);
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = rstd * read(args.weight, c, 1);
      map[16 + c] = static_cast<float>(scale);
      map[16 + channels + c] = static_cast<float>(scale * (map[0] - mu) + read(args.bias, c, 0));
    }
  }

  void run_tile(int64_t tile) const {
    const int64_t channels = args.channels, image = tiles.image(tile), length = tiles.length(tile);
    const int64_t offset = image * channels * args.positions + tiles.start(tile);
    const X* x = static_cast<const X*>(args.x) + offset;
    T* out = static_cast<T*>(args.out) + offset;
    if (!args.per_position) {
      const float* map = maps + image * map_floats();
      const Vec centre = Vec::broadcast(map[0]);
      for (int64_t c = 0; c < channels; ++c) {
        const Vec scale = Vec::broadcast(map[16 + c]), shift = Vec::broadcast(map[16 + channels + c]);
        for (int64_t j = 0; j < length; j += Vec::kLanes) {
          const int n = static_cast<int>(length - j);
          const Vec value = Vec::load_n(x + c * args.positions + j, n);
          fma(scale, value - centre, shift).store_n(out + c * args.positions + j, n);
        }
      }
      return;
    }
    for (int64_t j = 0; j < length; j += Vec::kLanes) {
      const int n = static_cast<int>(length - j);
      const auto load = [&](int64_t c) { return Vec::load_n(x + c * args.positions + j, n); };
      Vec mean, rstd;
      position_statistics(channels, args.eps, load, &mean, &rstd);
      for (int64_t c = 0; c < channels; ++c)
        fma((load(c) - mean) * rstd, Vec::broadcast(maps[c]), Vec::broadcast(maps[channels + c]))
            .store_n(out + c * args.positions + j, n);
    }
  }

  static void run_maps(int64_t begin, int64_t end, void* context) {
    for (int64_t image = begin; image < end; ++image) static_cast<const NormKernel*>(context)->make_map(image);
  }
  static void run_tiles(int64_t begin, int64_t end, void* context) {
    for (int64_t tile = begin; tile < end; ++tile) static_cast<const NormKernel*>(context)->run_tile(tile);
  }

  int64_t run() {
    const int64_t floats = args.per_position ? 2 * args.channels : args.batch * map_floats();
    const Buffer buffer(floats * static_cast<int64_t>(sizeof(float)));
    if (!buffer.data) return floats * static_cast<int64_t>(sizeof(float));
    maps = static_cast<float*>(buffer.data);
    if (args.per_position) {
      read_all(args.weight, args.channels, 1, maps);
      read_all(args.bias, args.channels, 0, maps + args.channels);
    } else {
      args.pool.run(args.batch, &run_maps, this);
    }
    args.pool.run(tiles.count(), &run_tiles, this);
    return 0;
  }
};

inline int64_t norm(const cpu::NormArgs& args) {
  return with_dtypes(args.x_dtype, args.dtype, [&](auto x, auto out) {
    return NormKernel<decltype(x), decltype(out)>{args, Tiles(args.batch, args.positions)}.run();
  });
}

}  // namespace riformer::RIFORMER_ISA
