// Reading parameters of whatever dtype the caller keeps them in.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace riformer::RIFORMER_ISA {

using cpu::Parameter;

// Calls f with the parameter's values, as a pointer to their own type.
template <class F>
inline auto with_values(const Parameter& parameter, F&& f) {
  return with_dtype(parameter.dtype,
                    [&](auto element) { return f(static_cast<const decltype(element)*>(parameter.data)); });
}

// Element `index`, or `absent` where the caller gave no such parameter.
inline double read(const Parameter& parameter, int64_t index, double absent) {
  if (!parameter.data) return absent;
  return with_values(parameter, [&](const auto* values) { return static_cast<double>(widen(values[index])); });
}

inline void read_all(const Parameter& parameter, int64_t count, double absent, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(read(parameter, i, absent));
}

}  // namespace riformer::RIFORMER_ISA
