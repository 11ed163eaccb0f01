// Final norm, average pooling and the classifier. With GroupNorm(1) the pooled feature is an affine map of the means.
#pragma once

#include <atomic>

#include "gemm.h"
#include "moments.h"
#include "norm_map.h"

namespace riformer::RIFORMER_ISA {

// float32 throughout: it is one product of [classes, channels] with one column per image.
template <class X, class T>
struct HeadKernel {
  using Gemm = GemmFloat32;
  static constexpr int kTokens = Gemm::kTokens;

  const cpu::HeadArgs& args;
  int64_t depth, panels;
  float* pooled = nullptr;  // panels of images: [panel][channel][kTokens]
  std::atomic<int64_t> missing{0};

  explicit HeadKernel(const cpu::HeadArgs& args_)
      : args(args_), depth(round_up(args.channels, 2)), panels((args.batch + kTokens - 1) / kTokens) {}

  float* column(int64_t image) const {
    return pooled + image / kTokens * depth * kTokens + image % kTokens;
  }

  void pool_from_moments(int64_t image) const {
    const int64_t channels = args.channels;
    const float* mean = args.moments + image * 2 * channels;
    double mu, rstd;
    image_statistics(
        channels, args.positions, args.eps, [&](int64_t c) { return static_cast<double>(mean[c]); },
        [&](int64_t c) { return static_cast<double>(mean[channels + c]); }, &mu, &rstd);
    float* to = column(image);
    for (int64_t c = 0; c < channels; ++c)
      to[c * kTokens] =
          static_cast<float>((mean[c] - mu) * rstd * read(args.norm_weight, c, 1) + read(args.norm_bias, c, 0));
  }

  // Each channel's sum runs over vectors of positions in order, then over the lanes.
  void pool_positions(int64_t image) {
    const int64_t channels = args.channels;
    const X* x = static_cast<const X*>(args.x) + image * channels * args.positions;
    float* to = column(image);
    double* sums = static_cast<double*>(cpu::thread_scratch(channels * static_cast<int64_t>(sizeof(double))));
    if (!sums) {
      missing.store(channels * static_cast<int64_t>(sizeof(double)));
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
      to[c * kTokens] =
          static_cast<float>(sums[c] * share * read(args.norm_weight, c, 1) + read(args.norm_bias, c, 0));
  }

  // Classes [first, first + count).
  void classify(int64_t first, int64_t count) {
    Arena sizes{nullptr};
    sizes.take<float>(Gemm::kCopiedRows * depth);
    sizes.take<float>(Gemm::kRows * kTokens);
    void* base = cpu::thread_scratch(sizes.used);
    if (!base) {
      missing.store(sizes.used);
      return;
    }
    Arena arena{static_cast<char*>(base)};
    float* scratch = arena.take<float>(Gemm::kCopiedRows * depth);
    float* sums = arena.take<float>(Gemm::kRows * kTokens);
    const WeightPart part{args.fc_weight.data, args.fc_weight.dtype, first * args.channels, args.channels, count,
                          args.channels};
    multiply_panels<Gemm>(
        part, pooled, args.batch, depth, false, scratch, [&](int64_t, int64_t) { return sums; },
        [&](int64_t p, int64_t row, int64_t rows, int, const float* c) {
          for (int64_t image = p * kTokens; image < args.batch && image < (p + 1) * kTokens; ++image)
            for (int64_t i = 0; i < rows; ++i) {
              const int64_t index = first + row + i;
              const float score = c[i * kTokens + image % kTokens] + static_cast<float>(read(args.fc_bias, index, 0));
              narrow(score, static_cast<T*>(args.out)[image * args.classes + index]);
            }
        });
  }

  static void run_pool(int64_t begin, int64_t end, void* context) {
    auto& kernel = *static_cast<HeadKernel*>(context);
    for (int64_t image = begin; image < end; ++image)
      kernel.args.per_position ? kernel.pool_positions(image) : kernel.pool_from_moments(image);
  }
  static void run_classes(int64_t begin, int64_t end, void* context) {
    auto& kernel = *static_cast<HeadKernel*>(context);
    const int64_t last = end * Gemm::kRows < kernel.args.classes ? end * Gemm::kRows : kernel.args.classes;
    kernel.classify(begin * Gemm::kRows, last - begin * Gemm::kRows);
  }

  int64_t run() {
    const int64_t bytes = panels * depth * kTokens * static_cast<int64_t>(sizeof(float));
    const Buffer buffer(bytes);
    if (!buffer.data) return bytes;
    pooled = static_cast<float*>(buffer.data);
    std::memset(pooled, 0, static_cast<size_t>(bytes));
    args.pool.run(args.batch, &run_pool, this);
    args.pool.run((args.classes + Gemm::kRows - 1) / Gemm::kRows, &run_classes, this);
    return missing.load();
  }
};

template <class X>
inline int64_t head_from(const cpu::HeadArgs& args) {
  if (args.dtype == DType::f32) return HeadKernel<X, float>(args).run();
  if (args.dtype == DType::bf16) return HeadKernel<X, bf16>(args).run();
  return HeadKernel<X, f16>(args).run();
}

inline int64_t head(const cpu::HeadArgs& args) {
  if (args.x_dtype == DType::f32) return head_from<float>(args);
  if (args.x_dtype == DType::bf16) return head_from<bf16>(args);
  return head_from<f16>(args);
}

}  // namespace riformer::RIFORMER_ISA
