// The vector type of the plain C++ kernels: one lane. It also defines what the wider ones (vec_*.h) must compute.
//
// Each vec_*.h must offer, in the namespace RIFORMER_ISA:
//   Vec            a struct with kLanes, broadcast, zero, load, load_n, store, store_n and sum. Loads widen each
//                  element type of common/dtypes.h to float32, stores round to nearest even. Kernels keep arrays of
//                  Vec, so the compiler must know its size.
//   functions      + - *, fma, clamp, abs, rsqrt, keep_n, lane_sums
//   for GELU       reciprocal, if_negative, nearest, scale_exponent: used by vec_math.h
//
// It may offer:
//   gelu_table     with the macro RIFORMER_GELU_TABLE. vec_math.h then takes GELU from the tables of
//                  common/gelu_table.h, and does not need the functions for GELU.
//
// Products that need instructions of their own, such as bfloat16's, are not part of it: see gemm_avx512_bf16.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/dtypes.h"

namespace riformer::RIFORMER_ISA {

// float32 lanes. load_n reads `n` lanes and sets the others to zero; store_n leaves memory past `n` lanes untouched.
// There n may be larger than kLanes, and then counts as kLanes.
struct Vec {
  static constexpr int kLanes = 1;
  float v;

  static Vec broadcast(float value) { return {value}; }
  static Vec zero() { return {0.f}; }
  template <class T>
  static Vec load(const T* from) {
    return {widen(*from)};
  }
  template <class T>
  static Vec load_n(const T* from, int) {
    return {widen(*from)};
  }
  template <class T>
  void store(T* to) const {
    narrow(v, *to);
  }
  template <class T>
  void store_n(T* to, int) const {
    narrow(v, *to);
  }
  float sum() const { return v; }
};

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {std::fma(a.v, b.v, c.v)}; }
inline Vec clamp(Vec a, Vec low, Vec high) {  // NaN stays NaN
  const float floor = a.v < low.v ? low.v : a.v;
  return {floor > high.v ? high.v : floor};
}
inline Vec abs(Vec a) { return {std::fabs(a.v)}; }
inline Vec reciprocal(Vec a) { return {1.f / a.v}; }
inline Vec rsqrt(Vec a) { return {1.f / std::sqrt(a.v)}; }
// a where x is negative, otherwise b
inline Vec if_negative(Vec x, Vec a, Vec b) { return {x.v < 0.f ? a.v : b.v}; }
inline Vec nearest(Vec a) { return {std::nearbyint(a.v)}; }
// a * 2^whole, zero below the normal range; NaN stays NaN
inline Vec scale_exponent(Vec a, Vec whole) {
  return {whole.v >= -126.f ? std::ldexp(a.v, static_cast<int>(whole.v)) : a.v * 0.f};
}
// Lane i: the sum of the lanes of v[i]
inline Vec lane_sums(const Vec* v) { return *v; }
// Lanes [0, n) of v, the others zero
inline Vec keep_n(Vec v, int) { return v; }

}  // namespace riformer::RIFORMER_ISA
