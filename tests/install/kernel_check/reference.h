// What the ops compute, stated plainly, in two arithmetics: Golden is double; Eager is float32 and rounds to the tested
// dtype after every op, as PyTorch does when it runs a model op by op. Eager's own error is what a kernel is judged by.
#pragma once

#include <cmath>
#include <cstdint>

#include "values.h"

namespace kernel_check {

struct Golden {
  using Real = double;
  static Real multiply_add(Real a, Real b, Real c) { return a * b + c; }
  static Real stored(Real value) { return value; }
};

// A sum of products is taken in chains of 64, as oneDNN's are about as exact as those. Statistics and GELU are computed
// in double here, so this is a stricter measure than PyTorch itself.
struct Eager {
  using Real = float;
  DType dtype;
  static Real multiply_add(Real a, Real b, Real c) { return std::fma(a, b, c); }
  Real stored(Real value) const { return static_cast<Real>(rounded(value, dtype)); }
};

struct Shape {
  int64_t batch, channels, positions;
  int64_t count() const { return batch * channels * positions; }
  size_t at(int64_t b, int64_t c, int64_t n) const { return static_cast<size_t>((b * channels + c) * positions + n); }
};

template <class A>
using Reals = std::vector<typename A::Real>;

template <class A>
Reals<A> reals(const Values& values) {
  return Reals<A>(values.begin(), values.end());
}

// sum over k of a[k] * b[k * step]
template <class A>
typename A::Real dot(const typename A::Real* a, const typename A::Real* b, int64_t depth, int64_t step) {
  typename A::Real sum = 0;
  for (int64_t begin = 0; begin < depth; begin += 64) {
    typename A::Real chain = 0;
    for (int64_t k = begin; k < depth && k < begin + 64; ++k) chain = A::multiply_add(a[k], b[k * step], chain);
    sum += chain;
  }
  return sum;
}

struct Statistics {
  double mean, rstd;
};
template <class At>
Statistics statistics(int64_t count, double eps, At at) {
  double mean = 0, square = 0;
  for (int64_t i = 0; i < count; ++i) mean += at(i);
  mean /= static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i) square += (at(i) - mean) * (at(i) - mean);
  return {mean, 1. / std::sqrt(square / static_cast<double>(count) + eps)};
}

// GroupNorm with one group or, per position, LayerNorm.
template <class A>
Reals<A> normed(const A& arithmetic, const Reals<A>& x, Shape s, const Values& weight, const Values& bias, double eps,
                bool per_position) {
  using Real = typename A::Real;
  Reals<A> out(x.size());
  for (int64_t b = 0; b < s.batch; ++b) {
    Statistics found = statistics(s.channels * s.positions, eps, [&](int64_t i) { return x[s.at(b, 0, 0) + i]; });
    for (int64_t n = 0; n < s.positions; ++n) {
      if (per_position) found = statistics(s.channels, eps, [&](int64_t c) { return x[s.at(b, c, n)]; });
      for (int64_t c = 0; c < s.channels; ++c) {
        const Real centred = static_cast<Real>(x[s.at(b, c, n)] - static_cast<Real>(found.mean));
        const Real scaled = centred * static_cast<Real>(found.rstd);
        out[s.at(b, c, n)] =
            arithmetic.stored(A::multiply_add(scaled, static_cast<Real>(weight[c]), static_cast<Real>(bias[c])));
      }
    }
  }
  return out;
}

// A convolution of one position: out[b, r, n] = sum over c of weight[r, c] x[b, c, n] + bias[r]
template <class A>
Reals<A> linear(const A& arithmetic, const Reals<A>& x, Shape s, const Values& weight, const Values& bias,
                int64_t rows) {
  const Reals<A> w = reals<A>(weight);
  const Shape to{s.batch, rows, s.positions};
  Reals<A> out(static_cast<size_t>(to.count()));
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < s.positions; ++n) {
        const auto sum = dot<A>(&w[r * s.channels], &x[s.at(b, 0, n)], s.channels, s.positions);
        out[to.at(b, r, n)] =
            arithmetic.stored(sum + static_cast<typename A::Real>(bias.empty() ? 0. : bias[static_cast<size_t>(r)]));
      }
  return out;
}

struct BlockValues {
  Values x, layer_scale_1, norm1_weight, norm1_bias, affine_weight, affine_bias, norm2_weight, norm2_bias;
  Values fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale_2;  // empty where the block has none
};

template <class A>
Values block(const A& arithmetic, const BlockValues& v, Shape s, int64_t hidden, double eps, bool per_position,
             bool residual) {
  using Real = typename A::Real;
  const auto per_channel = [&](Reals<A>& values, auto body) {
    for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i)
      values[i] = arithmetic.stored(body(values[i], i / s.positions % s.channels, i));
  };
  Reals<A> y = reals<A>(v.x);
  if (!v.norm1_weight.empty()) {
    Reals<A> mixed = normed(arithmetic, y, s, v.norm1_weight, v.norm1_bias, eps, per_position);
    if (!v.affine_weight.empty()) {
      const Reals<A> before = mixed;
      per_channel(mixed, [&](Real value, int64_t c, int64_t) {
        return A::multiply_add(value, static_cast<Real>(v.affine_weight[c]), static_cast<Real>(v.affine_bias[c]));
      });
      per_channel(mixed, [&](Real value, int64_t, int64_t i) { return value - before[i]; });
    }
    per_channel(mixed, [&](Real value, int64_t c, int64_t) { return value * static_cast<Real>(v.layer_scale_1[c]); });
    per_channel(y, [&](Real value, int64_t, int64_t i) { return value + mixed[i]; });
  }
  const Reals<A> z = normed(arithmetic, y, s, v.norm2_weight, v.norm2_bias, eps, per_position);
  Reals<A> inner = linear(arithmetic, z, s, v.fc1_weight, v.fc1_bias, hidden);
  for (Real& h : inner) {
    const double value = h;
    h = arithmetic.stored(static_cast<Real>(0.5 * value * std::erfc(-value * 0.70710678118654752)));
  }
  const Shape wide{s.batch, hidden, s.positions};
  Reals<A> branch = linear(arithmetic, inner, wide, v.fc2_weight, v.fc2_bias, s.channels);
  per_channel(branch, [&](Real value, int64_t c, int64_t) { return value * static_cast<Real>(v.layer_scale_2[c]); });
  if (residual) per_channel(branch, [&](Real value, int64_t, int64_t i) { return value + y[i]; });
  return Values(branch.begin(), branch.end());
}

template <class A>
Values norm(const A& arithmetic, const Values& x, Shape s, const Values& weight, const Values& bias, double eps,
            bool per_position) {
  const Reals<A> out = normed(arithmetic, reals<A>(x), s, weight, bias, eps, per_position);
  return Values(out.begin(), out.end());
}

struct HeadValues {
  Values x, norm_weight, norm_bias, fc_weight, fc_bias;
};

template <class A>
Values head(const A& arithmetic, const HeadValues& v, Shape s, int64_t classes, double eps, bool per_position) {
  const Reals<A> z = normed(arithmetic, reals<A>(v.x), s, v.norm_weight, v.norm_bias, eps, per_position);
  Reals<A> pooled(static_cast<size_t>(s.batch * s.channels));
  for (size_t i = 0; i < pooled.size(); ++i) {
    double sum = 0;
    for (int64_t n = 0; n < s.positions; ++n) sum += z[i * static_cast<size_t>(s.positions) + static_cast<size_t>(n)];
    pooled[i] = arithmetic.stored(static_cast<typename A::Real>(sum / static_cast<double>(s.positions)));
  }
  const Reals<A> out = linear(arithmetic, pooled, Shape{s.batch, s.channels, 1}, v.fc_weight, v.fc_bias, classes);
  return Values(out.begin(), out.end());
}

struct Convolution {
  int64_t batch, in_channels, height, width, channels, kernel_height, kernel_width, stride, padding;
  int64_t out_height() const { return (height + 2 * padding - kernel_height) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - kernel_width) / stride + 1; }
};

// x is [batch][in_channels][height][width], weight [channels][in_channels][kernel_height][kernel_width].
template <class A>
Values embed(const A& arithmetic, const Values& x, const Values& weight, const Values& bias, const Convolution& c) {
  const int64_t depth = c.in_channels * c.kernel_height * c.kernel_width;
  const Shape gathered{c.batch, depth, c.out_height() * c.out_width()};
  Reals<A> taps(static_cast<size_t>(gathered.count()));
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < gathered.positions; ++n) {
        const int64_t channel = k / (c.kernel_height * c.kernel_width);
        const int64_t row = n / c.out_width() * c.stride - c.padding + k / c.kernel_width % c.kernel_height;
        const int64_t column = n % c.out_width() * c.stride - c.padding + k % c.kernel_width;
        const bool inside = row >= 0 && row < c.height && column >= 0 && column < c.width;
        taps[gathered.at(b, k, n)] =
            inside ? static_cast<typename A::Real>(
                         x[static_cast<size_t>(((b * c.in_channels + channel) * c.height + row) * c.width + column)])
                   : 0;
      }
  const Reals<A> out = linear(arithmetic, taps, gathered, weight, bias, c.channels);
  return Values(out.begin(), out.end());
}

}  // namespace kernel_check
