// The vector type of the AVX2 kernels: eight float32 lanes. Needs AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../common/dtypes.h"

namespace riformer::RIFORMER_ISA {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }

  static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Vec load(const bf16* from) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
  static Vec load(const f16* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  static Vec load_n(const float* from, int n) {
    return n >= kLanes ? load(from) : Vec{_mm256_maskload_ps(from, mask(n))};
  }
  // AVX2 has no masked 16-bit moves: partial vectors of 16-bit types go through a buffer on the stack.
  static Vec load_n(const bf16* from, int n) { return n >= kLanes ? load(from) : load_partial(from, n); }
  static Vec load_n(const f16* from, int n) { return n >= kLanes ? load(from) : load_partial(from, n); }

  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store(bf16* to) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow_bf16()); }
  void store(f16* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store_n(float* to, int n) const {
    if (n >= kLanes) {
      store(to);
    } else {
      _mm256_maskstore_ps(to, mask(n), v);
    }
  }
  void store_n(bf16* to, int n) const { store_partial(to, n); }
  void store_n(f16* to, int n) const { store_partial(to, n); }

  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    half = _mm_add_ss(half, _mm_shuffle_ps(half, half, 1));
    return _mm_cvtss_f32(half);
  }

  static Vec widen_bf16(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  // The rounded bfloat16 of every lane in the low half of its 32 bits.
  __m256i rounded_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, quiet, nan);
  }
  __m128i narrow_bf16() const {
    const __m256i low = rounded_bf16();
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  }

 private:
  template <class T>
  static Vec load_partial(const T* from, int n) {
    T buffer[kLanes] = {};
    for (int i = 0; i < n; ++i) buffer[i] = from[i];
    return load(buffer);
  }
  template <class T>
  void store_partial(T* to, int n) const {
    if (n >= kLanes) {
      store(to);
      return;
    }
    T buffer[kLanes];
    store(buffer);
    for (int i = 0; i < n; ++i) to[i] = buffer[i];
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// The limit stands first: min and max return their second operand when either is NaN.
inline Vec clamp(Vec a, Vec low, Vec high) { return {_mm256_min_ps(high.v, _mm256_max_ps(low.v, a.v))}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
inline Vec reciprocal(Vec a) { return {_mm256_div_ps(_mm256_set1_ps(1.f), a.v)}; }
inline Vec rsqrt(Vec a) { return {_mm256_div_ps(_mm256_set1_ps(1.f), _mm256_sqrt_ps(a.v))}; }
inline Vec if_negative(Vec x, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, x.v)}; }
inline Vec lane_sums(const Vec* v) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0].v, v[1].v), _mm256_hadd_ps(v[2].v, v[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4].v, v[5].v), _mm256_hadd_ps(v[6].v, v[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}
inline Vec keep_n(Vec v, int n) { return {_mm256_and_ps(v.v, _mm256_castsi256_ps(Vec::mask(n)))}; }

inline Vec nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^whole for whole numbers in [-126, 127], by adding to the exponent
inline Vec scale_exponent(Vec a, Vec whole) {
  const __m256 floored = _mm256_max_ps(_mm256_set1_ps(-126.f), whole.v);
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(floored), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), exponent))};
}

}  // namespace riformer::RIFORMER_ISA
