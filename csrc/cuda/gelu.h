// GELU, x Phi(x), on the device. The coefficients and their errors are those of csrc/common/gelu.h.
#pragma once

#include <cmath>

#include "../common/gelu.h"
#include "device.h"

namespace riformer::cuda {

// For results that are rounded to 16 bits: 12 instructions, absolute error 3.4e-5. Of that 2.5e-5 are the polynomial's,
// the rest comes from float32 sums near -4.4. Half an ulp of bfloat16 is 3e-5 at 0.01 and 2e-3 at 1.
RIFORMER_DEVICE float gelu_16_bit(float x) {
  const float v = fminf(fmaxf(x, -kPhiClamp), kPhiClamp);
  const float s = v * v;
  // Device code may use an element of a host array only as a constant expression.
  constexpr float c0 = kPhi[0], c1 = kPhi[1], c2 = kPhi[2], c3 = kPhi[3], c4 = kPhi[4], c5 = kPhi[5], c6 = kPhi[6],
                  c7 = kPhi[7], c8 = kPhi[8];
  static_assert(kPhiTerms == 9, "one constant for each term");
  float p = multiply_add(c8, s, c7);
  p = multiply_add(p, s, c6);
  p = multiply_add(p, s, c5);
  p = multiply_add(p, s, c4);
  p = multiply_add(p, s, c3);
  p = multiply_add(p, s, c2);
  p = multiply_add(p, s, c1);
  p = multiply_add(p, s, c0);
  const float phi = multiply_add(v, p, 0.5f);
  // fmaxf drops a NaN, but this product has it again.
  return x * phi;
}

// For float32 results.
RIFORMER_DEVICE float gelu_float32(float x) { return x * multiply_add(0.5f, erff(x * 0.70710678118654752f), 0.5f); }

template <class T>
RIFORMER_DEVICE float gelu(float x) {
  static_assert(sizeof(T) == 2, "another element type needs a GELU of its own precision");
  return gelu_16_bit(x);
}
template <>
RIFORMER_DEVICE float gelu<float>(float x) {
  return gelu_float32(x);
}

}  // namespace riformer::cuda
