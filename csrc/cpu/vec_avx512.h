// The vector type of the AVX-512 kernels: sixteen float32 lanes. Needs AVX512 F, BW, DQ and VL; uses BF16 where it may.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../common/dtypes.h"
#include "../common/gelu_table.h"

namespace riformer::RIFORMER_ISA {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  static __mmask16 mask(int n) { return n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
  static Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }

  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vec load(const bf16* from) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
  static Vec load(const f16* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static Vec load_n(const float* from, int n) { return {_mm512_maskz_loadu_ps(mask(n), from)}; }
  static Vec load_n(const bf16* from, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(mask(n), from)); }
  static Vec load_n(const f16* from, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), from))}; }

  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(bf16* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow_bf16()); }
  void store(f16* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow_f16()); }
  void store_n(float* to, int n) const { _mm512_mask_storeu_ps(to, mask(n), v); }
  void store_n(bf16* to, int n) const { _mm256_mask_storeu_epi16(to, mask(n), narrow_bf16()); }
  void store_n(f16* to, int n) const { _mm256_mask_storeu_epi16(to, mask(n), narrow_f16()); }

  float sum() const { return _mm512_reduce_add_ps(v); }

  static Vec widen_bf16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
#ifdef __AVX512BF16__
  // vcvtneps2bf16 flushes subnormals to zero; bfloat16 shares float32's exponent range, so only values below 1.2e-38
  // are touched.
  __m256i narrow_bf16() const { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
  // As common/dtypes.h rounds: to nearest even, NaN stays NaN.
  __m256i narrow_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
  }
#endif
  __m256i narrow_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The limit stands first: min and max return their second operand when either is NaN.
inline Vec clamp(Vec a, Vec low, Vec high) { return {_mm512_min_ps(high.v, _mm512_max_ps(low.v, a.v))}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// One Newton step on the 14-bit estimate: within 1.5 ulp, at a third of the cost of the division.
inline Vec reciprocal(Vec a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.f)), r)};
}
inline Vec rsqrt(Vec a) { return {_mm512_div_ps(_mm512_set1_ps(1.f), _mm512_sqrt_ps(a.v))}; }
inline Vec if_negative(Vec x, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.v)), b.v, a.v)};
}
// Adds vectors pairwise in four rounds. Each round halves the number of vectors, and the lanes that belong to one sum.
inline Vec lane_sums(const Vec* v) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)  // a[i]: half of the lanes for v[i], half for v[i + 8]
    a[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(v[i].v, v[i + 8].v, 0x44), _mm512_shuffle_f32x4(v[i].v, v[i + 8].v, 0xee));
  for (int i = 0; i < 4; ++i)  // b[i]: a quarter each for v[i], v[i + 4], v[i + 8] and v[i + 12]
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
  const __m512 d = _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
  // The quarters of d are the sums 0 to 3, 8 to 11, 4 to 7 and 12 to 15: the two in the middle change places.
  return {_mm512_shuffle_f32x4(d, d, 0xd8)};
}
inline Vec keep_n(Vec v, int n) { return {_mm512_maskz_mov_ps(Vec::mask(n), v.v)}; }

inline Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_exponent(Vec a, Vec whole) { return {_mm512_scalef_ps(a.v, whole.v)}; }

inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }

// GELU as max(x, 0) - g(|x|), with g from the tables of gelu_table.h. Adding 1.5 * 2^23 rounds to a whole number, the
// segment's, and leaves it in the low bits, where the permutation reads its index. NaN stays NaN: min returns its
// second operand when either is NaN.
#define RIFORMER_GELU_TABLE
template <int kDegree>
inline Vec gelu_table(Vec x, const float (&table)[kDegree + 1][kGeluSegments], float scale, float limit) {
  const Vec t = {_mm512_min_ps(_mm512_set1_ps(limit), abs(x).v)};
  const Vec magic = Vec::broadcast(12582912.f), s = Vec::broadcast(scale);
  const Vec sum = fma(t, s, magic);
  const Vec f = {_mm512_fmsub_ps(t.v, s.v, (sum - magic).v)};
  const __m512i segment = _mm512_castps_si512(sum.v);
  const auto coefficient = [&](int k) {
    return Vec{_mm512_permutex2var_ps(_mm512_load_ps(table[k]), segment, _mm512_load_ps(table[k] + 16))};
  };
  Vec p = coefficient(kDegree);
  for (int k = kDegree - 1; k > 0; --k) p = fma(p, f, coefficient(k));
  return {_mm512_fnmadd_ps(p.v, f.v, (max(x, Vec::zero()) - coefficient(0)).v)};
}

}  // namespace riformer::RIFORMER_ISA
