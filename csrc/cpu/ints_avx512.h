// Ints (see ints_scalar.h) for AVX-512: with VNNI one instruction per dot product, without it six.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace riformer::RIFORMER_ISA {

struct Ints {
  __m512i v;

  static Ints zero() { return {_mm512_setzero_si512()}; }
  static Ints load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
  static Ints load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
  static Ints broadcast(const int8_t* from) {
    int four;
    std::memcpy(&four, from, 4);
    return {_mm512_set1_epi32(four)};
  }
};

inline void add_dot(Ints& sums, Ints bytes, Ints weights) {
#ifdef __AVX512VNNI__
  // Assembly, since GCC 12 copies the sums around the intrinsic: that doubles the instructions of a product.
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(bytes.v), "v"(weights.v));
#else
  // In 16 bits, and not by vpmaddubsw, which saturates. The compiler shares the halves among the calls of a product.
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(bytes.v, _mm512_set1_epi16(255)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(weights.v, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(bytes.v, 8), _mm512_srai_epi16(weights.v, 8));
  sums.v = _mm512_add_epi32(sums.v, _mm512_add_epi32(even, odd));
#endif
}

inline void store(Ints a, int32_t* to) { _mm512_storeu_si512(to, a.v); }
inline Vec load_whole(const int32_t* from) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(from))}; }

inline __m512i four_bytes(Vec a, Vec b, Vec c, Vec d) {
  const __m512i low = _mm512_or_si512(_mm512_cvtps_epi32(a.v), _mm512_slli_epi32(_mm512_cvtps_epi32(b.v), 8));
  return _mm512_or_si512(low, _mm512_or_si512(_mm512_slli_epi32(_mm512_cvtps_epi32(c.v), 16),
                                              _mm512_slli_epi32(_mm512_cvtps_epi32(d.v), 24)));
}
inline void put_bytes(uint8_t* to, Vec a, Vec b, Vec c, Vec d, AllLanes) {
  _mm512_storeu_si512(to, four_bytes(a, b, c, d));
}
inline void put_bytes(uint8_t* to, Vec a, Vec b, Vec c, Vec d, int n) {
  _mm512_mask_storeu_epi32(to, Vec::mask(n), four_bytes(a, b, c, d));
}

inline __m128i signed_bytes(Vec a) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)); }
inline void put_signed(int8_t* to, Vec a, AllLanes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), signed_bytes(a));
}
inline void put_signed(int8_t* to, Vec a, int n) { _mm_mask_storeu_epi8(to, Vec::mask(n), signed_bytes(a)); }

inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec larger_size(Vec a, Vec b) {
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(abs(b).v)))};
}
inline float largest_size(Vec a) {
  const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(a.v));
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

inline Vec lookup(const float* from, Ints lanes) { return {_mm512_permutexvar_ps(lanes.v, _mm512_loadu_ps(from))}; }

}  // namespace riformer::RIFORMER_ISA
