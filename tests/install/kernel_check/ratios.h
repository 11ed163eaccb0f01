// The error-ratio rule of riformer_kernels/numerics.py, and the check of moments of tests/support_moments.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "reference.h"

namespace kernel_check {

struct Figures {
  double max = 0, rms = 0, channel = 0, position = 0;
};

inline Figures figures(const Values& value, const Values& golden, Shape s) {
  Figures out;
  Values channels(static_cast<size_t>(s.channels)), positions(static_cast<size_t>(s.batch * s.positions));
  double total = 0;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t n = 0; n < s.positions; ++n) {
        const double error = value[s.at(b, c, n)] - golden[s.at(b, c, n)];
        // Not std::max, which would lose a NaN.
        out.max = std::fabs(error) <= out.max ? out.max : std::fabs(error);
        total += error * error;
        channels[static_cast<size_t>(c)] += error * error;
        positions[static_cast<size_t>(b * s.positions + n)] += error * error;
      }
  out.rms = std::sqrt(total / static_cast<double>(s.count()));
  const double most = *std::max_element(channels.begin(), channels.end());
  out.channel = std::sqrt(most / static_cast<double>(s.batch * s.positions));
  out.position = std::sqrt(*std::max_element(positions.begin(), positions.end()) / static_cast<double>(s.channels));
  return out;
}

// Ours over eager's, each figure.
inline Figures ratios(const Values& ours, const Values& eager, const Values& golden, Shape s) {
  const Figures a = figures(ours, golden, s), b = figures(eager, golden, s);
  const auto ratio = [](double x, double y) { return x == 0 ? 0 : x / y; };
  return {ratio(a.max, b.max), ratio(a.rms, b.rms), ratio(a.channel, b.channel), ratio(a.position, b.position)};
}

// Empty, or the figures above their limits. A NaN is above every limit.
inline std::string exceeded(const Figures& ratio, DType dtype) {
  std::string text;
  const auto look = [&](const char* name, double value, double limit) {
    if (value <= limit) return;
    char line[80];
    std::snprintf(line, sizeof(line), " %s %.3gx (limit %gx)", name, value, limit);
    text += line;
  };
  look("max", ratio.max, 2);
  look("rms", ratio.rms, dtype == DType::f32 ? 2 : 1.25);
  look("channel", ratio.channel, 2);
  look("position", ratio.position, 3);
  return text;
}

// Empty, or what is wrong with the moments of `x`.
inline std::string wrong_moments(const Values& moments, const Values& x, Shape s) {
  constexpr double kUnits = 8, kUnit = 0x1p-24;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < s.channels; ++c) {
      double mean = 0, centred = 0, largest = 0;
      for (int64_t n = 0; n < s.positions; ++n) mean += x[s.at(b, c, n)] / static_cast<double>(s.positions);
      for (int64_t n = 0; n < s.positions; ++n) {
        centred += (x[s.at(b, c, n)] - mean) * (x[s.at(b, c, n)] - mean);
        largest = std::max(largest, std::fabs(x[s.at(b, c, n)]));
      }
      const double off = kUnits * kUnit * largest, count = static_cast<double>(s.positions);
      const double slack = kUnits * kUnit * centred + count * off * off + off * std::sqrt(count * centred) / 4 + 1e-37;
      const size_t at = static_cast<size_t>(b * 2 * s.channels + c);
      if (!(std::fabs(moments[at] - mean) <= off + 1e-37)) return " a mean is off";
      if (!(std::fabs(moments[at + static_cast<size_t>(s.channels)] - centred) <= slack))
        return " a centred sum of squares is off";
    }
  return "";
}

}  // namespace kernel_check
