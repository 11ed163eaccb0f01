// GELU on any vector type, in the two accuracies of common/gelu.h.
#pragma once

#include "../common/gelu.h"

namespace riformer::RIFORMER_ISA {

#ifdef RIFORMER_GELU_TABLE
// The tables need a third of the polynomials' multiply-adds, which compete with the products for the same execution
// units (bench/notes/2026-11-21-cpu-gelu.md).
inline Vec gelu_float32(Vec x) {
  return gelu_table<kGeluFloat32Degree>(x, kGeluFloat32, kGeluFloat32Scale, kGeluFloat32Limit);
}
inline Vec gelu_bfloat16(Vec x) {
  return gelu_table<kGeluBfloat16Degree>(x, kGeluBfloat16, kGeluBfloat16Scale, kGeluBfloat16Limit);
}
#else
// 2^y for y <= 0: a polynomial of degree 6 on [-1/2, 1/2], relative error 1.6e-8 with float32 coefficients.
inline Vec exp2_nonpositive(Vec y) {
  const Vec whole = nearest(y);
  const Vec f = y - whole;
  Vec p = Vec::broadcast(1.535336085e-4f);
  p = fma(p, f, Vec::broadcast(1.339887483e-3f));
  p = fma(p, f, Vec::broadcast(9.618437365e-3f));
  p = fma(p, f, Vec::broadcast(5.550332470e-2f));
  p = fma(p, f, Vec::broadcast(2.402264791e-1f));
  p = fma(p, f, Vec::broadcast(6.931472029e-1f));
  p = fma(p, f, Vec::broadcast(1.f));
  return scale_exponent(p, whole);
}

// x Phi(x) to float32 accuracy, also in the negative tail, where 1 + erf would cancel.
inline Vec gelu_float32(Vec x) {
  // Beyond 12 the exponential is zero in float32; the clamp keeps infinity out of the reciprocal.
  const Vec t = clamp(abs(x) * Vec::broadcast(0.70710678118654752f), Vec::zero(), Vec::broadcast(12.f));
  const Vec u = reciprocal(fma(t, Vec::broadcast(kErfcScale), Vec::broadcast(1.f)));
  Vec p = Vec::broadcast(kErfc[kErfcTerms - 1]);
  for (int k = kErfcTerms - 2; k >= 0; --k) p = fma(p, u, Vec::broadcast(kErfc[k]));
  const Vec gauss = exp2_nonpositive(t * t * Vec::broadcast(-1.4426950408889634f));
  const Vec tail = p * u * gauss * Vec::broadcast(0.5f);  // Phi(-|x|)
  return x * if_negative(x, tail, Vec::broadcast(1.f) - tail);
}

// x Phi(x) for a result that is rounded to bfloat16.
inline Vec gelu_bfloat16(Vec x) {
  const Vec v = clamp(x, Vec::broadcast(-kPhiClamp), Vec::broadcast(kPhiClamp));
  const Vec s = v * v;
  Vec p = Vec::broadcast(kPhi[kPhiTerms - 1]);
  for (int k = kPhiTerms - 2; k >= 0; --k) p = fma(p, s, Vec::broadcast(kPhi[k]));
  return x * fma(v, p, Vec::broadcast(0.5f));
}
#endif

}  // namespace riformer::RIFORMER_ISA
