// Ints (see ints_scalar.h) for AVX2: with AVX-VNNI one instruction per dot product, without it six.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace riformer::RIFORMER_ISA {

struct Ints {
  __m256i v;

  static Ints zero() { return {_mm256_setzero_si256()}; }
  static Ints load(const uint8_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
  static Ints load(const int32_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
  static Ints broadcast(const int8_t* from) {
    int four;
    std::memcpy(&four, from, 4);
    return {_mm256_set1_epi32(four)};
  }
};

inline void add_dot(Ints& sums, Ints bytes, Ints weights) {
#ifdef __AVXVNNI__
  // Assembly, since GCC 12 copies the sums around the intrinsic: that doubles the instructions of a product.
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums.v) : "x"(bytes.v), "x"(weights.v));
#else
  // In 16 bits, and not by vpmaddubsw, which saturates. The compiler shares the halves among the calls of a product.
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(bytes.v, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(weights.v, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(bytes.v, 8), _mm256_srai_epi16(weights.v, 8));
  sums.v = _mm256_add_epi32(sums.v, _mm256_add_epi32(even, odd));
#endif
}

inline void store(Ints a, int32_t* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.v); }
inline Vec load_whole(const int32_t* from) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}

inline __m256i four_bytes(Vec a, Vec b, Vec c, Vec d) {
  const __m256i low = _mm256_or_si256(_mm256_cvtps_epi32(a.v), _mm256_slli_epi32(_mm256_cvtps_epi32(b.v), 8));
  return _mm256_or_si256(low, _mm256_or_si256(_mm256_slli_epi32(_mm256_cvtps_epi32(c.v), 16),
                                              _mm256_slli_epi32(_mm256_cvtps_epi32(d.v), 24)));
}
inline void put_bytes(uint8_t* to, Vec a, Vec b, Vec c, Vec d, AllLanes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), four_bytes(a, b, c, d));
}
inline void put_bytes(uint8_t* to, Vec a, Vec b, Vec c, Vec d, int n) {
  _mm256_maskstore_epi32(reinterpret_cast<int*>(to), Vec::mask(n), four_bytes(a, b, c, d));
}

inline void put_signed(int8_t* to, Vec a, AllLanes) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}
inline void put_signed(int8_t* to, Vec a, int n) {
  int8_t buffer[Vec::kLanes];
  put_signed(buffer, a, AllLanes{});
  for (int i = 0; i < n && i < Vec::kLanes; ++i) to[i] = buffer[i];
}

inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec larger_size(Vec a, Vec b) {
  return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(abs(b).v)))};
}
inline float largest_size(Vec a) {
  alignas(32) int32_t lanes[Vec::kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_castps_si256(a.v));
  int32_t bits = 0;
  for (const int32_t lane : lanes) bits = bits > lane ? bits : lane;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

inline Vec lookup(const float* from, Ints lanes) { return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), lanes.v)}; }

}  // namespace riformer::RIFORMER_ISA
