// Final norm, average pooling and the classifier. With GroupNorm(1) the pooled feature is an affine map of the means.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "memory.h"
#include "norm_map.h"

namespace riformer::RIFORMER_ISA {

// Everything is float32. An image is a single column of the product here, so lanes are channels and not tokens. The
// order in which a score is summed up depends on the channels alone, not on the scores that are computed beside it.
template <class X, class T>
struct HeadKernel {
  static constexpr int kClasses = 4, kImages = 2;  // kClasses * kImages scores are summed side by side
  static constexpr int64_t kChain = 64;            // a sum is taken in chains of this many products, as in GemmFloat32

  const cpu::HeadArgs& args;
  int64_t pitch;            // channels, padded with zeros
  float* pooled = nullptr;  // [batch][pitch]
  std::atomic<int64_t> missing_bytes{0};

  explicit HeadKernel(const cpu::HeadArgs& args_)
      : args(args_), pitch((args.channels + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes) {}

  void pool_from_moments(int64_t image) const {
    const int64_t channels = args.channels;
    const float* mean = args.moments + image * 2 * channels;
    double mu, rstd;
    image_statistics(
        channels, args.positions, args.eps, [&](int64_t c) { return static_cast<double>(mean[c]); },
        [&](int64_t c) { return static_cast<double>(mean[channels + c]); }, &mu, &rstd);
    float* to = pooled + image * pitch;
    for (int64_t c = 0; c < channels; ++c)
      to[c] = static_cast<float>((mean[c] - mu) * rstd * read(args.norm_weight, c, 1) + read(args.norm_bias, c, 0));
  }

  // LayerNorm: every position has its own statistics, so the normalised values are summed position by position.
  void pool_positions(int64_t image) {
    const int64_t channels = args.channels;
    const X* x = static_cast<const X*>(args.x) + image * channels * args.positions;
    float* to = pooled + image * pitch;
    double* sums = static_cast<double*>(cpu::thread_scratch(channels * static_cast<int64_t>(sizeof(double))));
    if (!sums) {
      missing_bytes.store(channels * static_cast<int64_t>(sizeof(double)));
      return;
    }
    for (int64_t c = 0; c < channels; ++c) sums[c] = 0.;
    for (int64_t j = 0; j < args.positions; j += Vec::kLanes) {
      const int n = static_cast<int>(args.positions - j < Vec::kLanes ? args.positions - j : Vec::kLanes);
      const auto load = [&](int64_t c) { return Vec::load_n(x + c * args.positions + j, n); };
      Vec mean, rstd;
      position_statistics(channels, args.eps, load, &mean, &rstd);
      for (int64_t c = 0; c < channels; ++c) sums[c] += keep_n((load(c) - mean) * rstd, n).sum();
    }
    const double share = 1. / static_cast<double>(args.positions);
    for (int64_t c = 0; c < channels; ++c)
      to[c] = static_cast<float>(sums[c] * share * read(args.norm_weight, c, 1) + read(args.norm_bias, c, 0));
  }

  template <class W, int kUsedClasses, int kUsedImages>
  void scores(const W* weight, int64_t first, int64_t image) const {
    Vec sums[kUsedClasses][kUsedImages];
    for (int64_t begin = 0; begin < args.channels; begin += kChain * Vec::kLanes) {
      const int64_t left = args.channels - begin;
      Vec chain[kUsedClasses][kUsedImages];
      for (auto& row : chain)
        for (Vec& sum : row) sum = Vec::zero();
      for_each_vector(left < kChain * Vec::kLanes ? left : kChain * Vec::kLanes, [&](int64_t j, auto lanes) {
        Vec x[kUsedImages];
        for (int i = 0; i < kUsedImages; ++i) x[i] = Vec::load(pooled + (image + i) * pitch + begin + j);
        for (int r = 0; r < kUsedClasses; ++r) {
          const Vec w = load(weight + (first + r) * args.channels + begin + j, lanes);
          for (int i = 0; i < kUsedImages; ++i) chain[r][i] = fma(w, x[i], chain[r][i]);
        }
      });
      for (int r = 0; r < kUsedClasses; ++r)
        for (int i = 0; i < kUsedImages; ++i) sums[r][i] = begin > 0 ? sums[r][i] + chain[r][i] : chain[r][i];
    }
    for (int r = 0; r < kUsedClasses; ++r)
      for (int i = 0; i < kUsedImages; ++i) {
        const float score = sums[r][i].sum() + static_cast<float>(read(args.fc_bias, first + r, 0));
        narrow(score, static_cast<T*>(args.out)[(image + i) * args.classes + first + r]);
      }
  }
  template <class W, int kUsedClasses>
  void score_images(const W* weight, int64_t first) const {
    int64_t image = 0;
    for (; image + kImages <= args.batch; image += kImages) scores<W, kUsedClasses, kImages>(weight, first, image);
    for (; image < args.batch; ++image) scores<W, kUsedClasses, 1>(weight, first, image);
  }
  template <class W>
  void classify(const W* weight, int64_t first, int64_t last) const {
    for (; first + kClasses <= last; first += kClasses) score_images<W, kClasses>(weight, first);
    for (; first < last; ++first) score_images<W, 1>(weight, first);
  }

  static void run_pool(int64_t begin, int64_t end, void* context) {
    auto& kernel = *static_cast<HeadKernel*>(context);
    for (int64_t image = begin; image < end; ++image)
      kernel.args.per_position ? kernel.pool_positions(image) : kernel.pool_from_moments(image);
  }
  static void run_classes(int64_t begin, int64_t end, void* context) {
    const auto& kernel = *static_cast<const HeadKernel*>(context);
    const cpu::HeadArgs& args = kernel.args;
    const int64_t first = begin * kClasses, last = end * kClasses < args.classes ? end * kClasses : args.classes;
    with_values(args.fc_weight, [&](const auto* weight) { kernel.classify(weight, first, last); });
  }

  int64_t run() {
    const int64_t bytes = args.batch * pitch * static_cast<int64_t>(sizeof(float));
    const Buffer buffer(bytes);
    if (!buffer.data) return bytes;
    pooled = static_cast<float*>(buffer.data);
    std::memset(pooled, 0, static_cast<size_t>(bytes));
    args.pool.run(args.batch, &run_pool, this);
    args.pool.run((args.classes + kClasses - 1) / kClasses, &run_classes, this);
    return missing_bytes.load();
  }
};

inline int64_t head(const cpu::HeadArgs& args) {
  return with_dtypes(args.x_dtype, args.dtype,
                     [&](auto x, auto out) { return HeadKernel<decltype(x), decltype(out)>(args).run(); });
}

}  // namespace riformer::RIFORMER_ISA
