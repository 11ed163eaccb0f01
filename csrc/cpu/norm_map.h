// The norms as maps of x: coefficients from moments (GroupNorm with one group), or statistics of each position's
// channels (LayerNorm), and the fold of the token mixer's affine.
#pragma once

#include <cmath>

#include "parameters.h"

namespace riformer::RIFORMER_ISA {

// The weight and bias of norm 1 at channel c, with the token mixer's affine (scale s, shift t) folded in: gamma (s - 1)
// and beta (s - 1) + t. A deployed block has no affine and uses gamma and beta as they are.
inline void folded_norm1(const cpu::BlockArgs& args, int64_t c, double* weight, double* bias) {
  const double difference = args.affine_weight.data ? read(args.affine_weight, c, 0) - 1. : 1.;
  *weight = read(args.norm1_weight, c, 1) * difference;
  *bias = read(args.norm1_bias, c, 0) * difference + read(args.affine_bias, c, 0);
}

// Mean and rstd over all channels and positions of one image, from its moments. `mean` and `centred` are functions of
// the channel, so that they can also be the moments of y = a x + d, which are a m + d and a^2 V: the statistics of y
// then need no pass over y. In double, because only 2C numbers stand for the whole image.
template <class Mean, class Centred>
inline void image_statistics(int64_t channels, int64_t positions, double eps, Mean mean, Centred centred, double* mu,
                             double* rstd) {
  double total = 0;
  for (int64_t c = 0; c < channels; ++c) total += mean(c);
  *mu = total / static_cast<double>(channels);
  double spread = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const double difference = mean(c) - *mu;
    spread += centred(c) + static_cast<double>(positions) * difference * difference;
  }
  *rstd = 1. / std::sqrt(spread / (static_cast<double>(positions) * static_cast<double>(channels)) + eps);
}

// The first half of a block as two affine maps of x, for one image. With p the centre:
//     y = x + y_scale (x - p) + y_shift          z = z_scale (x - p) + z_shift = norm2(y)
// The centre is the image's mean rounded to float32; subtracted first, so that a large mean cancels exactly.
// In memory: the centre, padded to one vector, then the four rows [channels].
struct ImageMap {
  float* centre;
  float *z_scale, *z_shift, *y_scale, *y_shift;

  static int64_t floats(int64_t channels) { return 16 + 4 * channels; }
  ImageMap(float* memory, int64_t image, int64_t channels) {
    centre = memory + image * floats(channels);
    z_scale = centre + 16;
    z_shift = z_scale + channels;
    y_scale = z_shift + channels;
    y_shift = y_scale + channels;
  }
};

inline void make_block_map(const cpu::BlockArgs& args, int64_t image, const ImageMap& map) {
  const int64_t channels = args.channels;
  const float* mean = args.moments + image * 2 * channels;
  const float* centred = mean + channels;
  double mu1, rstd1;
  image_statistics(
      channels, args.positions, args.eps1, [&](int64_t c) { return static_cast<double>(mean[c]); },
      [&](int64_t c) { return static_cast<double>(centred[c]); }, &mu1, &rstd1);
  const double centre = static_cast<float>(mu1);
  *map.centre = static_cast<float>(mu1);
  for (int64_t c = 0; c < channels; ++c) {
    double scale = 0, shift = 0;
    if (args.norm1_weight.data) {
      double weight, bias;
      folded_norm1(args, c, &weight, &bias);
      const double layer_scale = read(args.layer_scale_1, c, 1);
      scale = layer_scale * weight * rstd1;
      shift = layer_scale * bias + scale * (centre - mu1);
    }
    map.y_scale[c] = static_cast<float>(scale);
    map.y_shift[c] = static_cast<float>(shift);
  }
  const auto mean_y = [&](int64_t c) {
    return mean[c] + static_cast<double>(map.y_scale[c]) * (mean[c] - centre) + static_cast<double>(map.y_shift[c]);
  };
  const auto centred_y = [&](int64_t c) {
    const double a = 1. + map.y_scale[c];
    return a * a * centred[c];
  };
  double mu2, rstd2;
  image_statistics(channels, args.positions, args.eps2, mean_y, centred_y, &mu2, &rstd2);
  for (int64_t c = 0; c < channels; ++c) {
    const double gain = rstd2 * read(args.norm2_weight, c, 1);
    map.z_scale[c] = static_cast<float>((1. + map.y_scale[c]) * gain);
    map.z_shift[c] = static_cast<float>((centre + map.y_shift[c] - mu2) * gain + read(args.norm2_bias, c, 0));
  }
}

// Mean and rstd over the channels, for the positions in one vector; load(c) returns channel c of these positions. Takes
// four sums at once, so that the additions do not wait for each other.
template <class Load>
inline void position_statistics(int64_t channels, double eps, Load load, Vec* mean, Vec* rstd) {
  Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  for (int64_t c = 0; c < channels; ++c) sums[c & 3] = sums[c & 3] + load(c);
  const Vec share = Vec::broadcast(1.f / static_cast<float>(channels));
  const Vec mu = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * share;
  // In exact arithmetic the differences add up to zero. What they add up to is the rounding error of mu, which is large
  // where the mean is far from zero; it is added to mu and taken out of the variance.
  Vec rest[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  for (auto& sum : sums) sum = Vec::zero();
  for (int64_t c = 0; c < channels; ++c) {
    const Vec difference = load(c) - mu;
    rest[c & 3] = rest[c & 3] + difference;
    sums[c & 3] = fma(difference, difference, sums[c & 3]);
  }
  const Vec error = ((rest[0] + rest[1]) + (rest[2] + rest[3])) * share;
  const Vec variance = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * share - error * error;
  *mean = mu + error;
  *rstd = rsqrt(variance + Vec::broadcast(static_cast<float>(eps)));
}

}  // namespace riformer::RIFORMER_ISA
