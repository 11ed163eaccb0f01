// The means that correct the biases of an int8 block (quantise.h says why): of z, exactly, and of the hidden channels,
// estimated. Both are of one image, so that an image gives the same bits in any batch.
#pragma once

#include <cmath>

#include "block.h"
#include "gemm_int8.h"

namespace riformer::RIFORMER_ISA {

// The mean of GELU over normally distributed values of this mean and standard deviation, by the quadrature of Gauss and
// Hermite with three nodes. What it is for needs no more: with the true means of the hidden channels S12's features
// have 1.33x of eager bfloat16's error, with these 1.33x, without any 1.65x.
inline Vec mean_of_gelu(Vec mean, Vec deviation) {
  const Vec step = deviation * Vec::broadcast(1.7320508f);
  const Vec around = gelu_bfloat16(mean + step) + gelu_bfloat16(mean - step);
  return fma(around, Vec::broadcast(1.f / 6.f), gelu_bfloat16(mean) * Vec::broadcast(2.f / 3.f));
}

struct Int8Means {
  float* z_mean;    // [image][channel]
  float* z_spread;  // [image]: the standard deviation of z over the positions, as a root mean square of the channels
  float* tiles;     // with LayerNorm [tile][channels + 1]: sums over the positions of z, and of z squared

  void take(Arena& arena, const cpu::BlockArgs& args, const Tiles& all) {
    z_mean = arena.take<float>(args.batch * args.channels);
    z_spread = arena.take<float>(args.batch);
    tiles = arena.take<float>(args.per_position ? all.count() * (args.channels + 1) : 0);
  }

  // GroupNorm: from the moments of x, as z is an affine map of x.
  void from_maps(const cpu::BlockArgs& args, float* maps) const {
    for (int64_t image = 0; image < args.batch; ++image) {
      const ImageMap map(maps, image, args.channels);
      const float* mean = args.moments + image * 2 * args.channels;
      double spread = 0;
      for (int64_t c = 0; c < args.channels; ++c) {
        z_mean[image * args.channels + c] = map.z_scale[c] * (mean[c] - *map.centre) + map.z_shift[c];
        spread += static_cast<double>(map.z_scale[c]) * map.z_scale[c] * mean[args.channels + c];
      }
      z_spread[image] = static_cast<float>(std::sqrt(spread / static_cast<double>(args.positions * args.channels)));
    }
  }

  // LayerNorm: z of one span, to rows kTokens apart, and back to y.
  template <class Kernel>
  void z_of(const Kernel& kernel, const Span& span, float* panels) const {
    const int64_t channels = kernel.args.channels;
    const float *weight = kernel.maps + 2 * channels, *bias = weight + channels;
    float* rows = panels + span.panel * channels * Kernel::kTokens + span.token;
    for (int j = 0; j < span.length; j += Vec::kLanes) {
      const int n = span.length - j;
      Vec mean, rstd;
      kernel.position_rows(span, j, n, rows, &mean, &rstd);
      for (int64_t c = 0; c < channels; ++c) {
        float* at = rows + c * Kernel::kTokens + j;
        fma((Vec::load_n(at, n) - mean) * rstd, Vec::broadcast(weight[c]), Vec::broadcast(bias[c])).store_n(at, n);
      }
    }
  }
  template <class Kernel>
  void y_of(const Kernel& kernel, const Span& span, float* panels) const {
    float* rows = panels + span.panel * kernel.args.channels * Kernel::kTokens + span.token;
    Vec mean, rstd;
    for (int j = 0; j < span.length; j += Vec::kLanes)
      kernel.position_rows(span, j, span.length - j, rows, &mean, &rstd);
  }

  // LayerNorm: by a pass over x. The sums of the tiles are added up in their order.
  template <class Kernel>
  void from_positions(Kernel& kernel) const {
    const cpu::BlockArgs& args = kernel.args;
    args.pool.run(
        kernel.tasks.tiles.count(),
        [](int64_t begin, int64_t end, void* context) {
          const Kernel& self = *static_cast<Kernel*>(context);
          for (int64_t tile = begin; tile < end; ++tile) self.means.sums_of_tile(self, tile);
        },
        &kernel);
    const Tiles& all = kernel.tasks.tiles;
    const double positions = static_cast<double>(args.positions), channels = static_cast<double>(args.channels);
    for (int64_t image = 0; image < args.batch; ++image) {
      double spread = 0;
      for (int64_t c = 0; c <= args.channels; ++c) {
        double sum = 0;
        for (int64_t tile = image * all.per_image; tile < (image + 1) * all.per_image; ++tile)
          sum += tiles[tile * (args.channels + 1) + c];
        const double mean = sum / positions;
        spread += c < args.channels ? -mean * mean : mean;
        if (c < args.channels) z_mean[image * args.channels + c] = static_cast<float>(mean);
      }
      z_spread[image] = static_cast<float>(std::sqrt(spread > 0 ? spread / channels : 0));
    }
  }

  template <class Kernel>
  void sums_of_tile(const Kernel& kernel, int64_t tile) const {
    const int64_t channels = kernel.args.channels;
    const int64_t bytes = kernel.memory(nullptr).bytes;
    void* base = cpu::thread_scratch(bytes);
    if (!base) {
      const_cast<Kernel&>(kernel).missing_bytes.store(bytes);
      return;
    }
    const auto m = kernel.memory(base);
    const Panels cut = panels_of<typename Kernel::Gemm>(kernel.tasks.tiles, tile, tile + 1);
    const int spans = cut_spans(cut, m.spans);
    for (int i = 0; i < spans; ++i) z_of(kernel, m.spans[i], m.y);
    float* sums = tiles + tile * (channels + 1);
    Vec squares = Vec::zero();
    for (int64_t c = 0; c < channels; ++c) {
      Vec sum = Vec::zero();
      for (const Span* span = m.spans; span < m.spans + spans; ++span) {
        const float* z = m.y + (span->panel * channels + c) * Kernel::kTokens + span->token;
        for_each_vector(span->length, [&](int64_t j, auto lanes) {
          const Vec value = load(z + j, lanes);
          sum = sum + value;
          squares = fma(value, value, squares);
        });
      }
      sums[c] = sum.sum();
    }
    sums[channels] = squares.sum();
  }
};

}  // namespace riformer::RIFORMER_ISA
