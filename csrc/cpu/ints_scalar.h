// Integers for the int8 products, in plain C++: one lane. It also defines what the wider ones (ints_*.h) must compute.
//
// Each ints_*.h must offer, beside the Vec of its vec_*.h:
//   Ints           int32 lanes, each of which may be taken for four bytes
//   add_dot        adds to sums the products of four unsigned with four signed bytes, lane by lane. It must be exact:
//   then all
//                  instruction sets get the same sums from the same bytes, in whatever order they add.
//   put_bytes      the nearest whole numbers of four vectors in [0, 255], as the four bytes of each lane
//   put_signed     the nearest whole numbers of a vector in [-127, 127], as neighbouring bytes
//   load_whole     the stored sums as float32, to nearest even
//   larger_size    of a >= 0 and |b|, where NaN counts as larger than infinity; largest_size: that of the lanes
//   larger, smaller (b where either is NaN), lookup (in lane i what from[] has at lanes' lane i)
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace riformer::RIFORMER_ISA {

struct Ints {
  int32_t v;

  static Ints zero() { return {0}; }
  static Ints load(const uint8_t* from) {
    return {static_cast<int32_t>(from[0] | from[1] << 8 | from[2] << 16 | static_cast<uint32_t>(from[3]) << 24)};
  }
  static Ints load(const int32_t* from) { return {*from}; }
  static Ints broadcast(const int8_t* from) { return load(reinterpret_cast<const uint8_t*>(from)); }
};

inline void add_dot(Ints& sums, Ints bytes, Ints weights) {
  for (int shift = 0; shift < 32; shift += 8)
    sums.v += static_cast<int32_t>(static_cast<uint32_t>(bytes.v) >> shift & 255) *
              static_cast<int8_t>(static_cast<uint32_t>(weights.v) >> shift);
}

inline void store(Ints a, int32_t* to) { *to = a.v; }
inline Vec load_whole(const int32_t* from) { return {static_cast<float>(*from)}; }

// NaN and infinity become 0, as a conversion of them is undefined. Their scales are not finite, and carry them on.
inline int32_t whole(Vec a) { return std::fabs(a.v) < 1e6f ? static_cast<int32_t>(std::nearbyint(a.v)) : 0; }
template <class Lanes>
inline void put_bytes(uint8_t* to, Vec a, Vec b, Vec c, Vec d, Lanes) {
  const Vec four[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(whole(four[i]));
}
template <class Lanes>
inline void put_signed(int8_t* to, Vec a, Lanes) {
  *to = static_cast<int8_t>(whole(a));
}

inline Vec larger(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec smaller(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec larger_size(Vec a, Vec b) { return {a.v >= std::fabs(b.v) || a.v != a.v ? a.v : std::fabs(b.v)}; }
inline float largest_size(Vec a) { return a.v; }

inline Vec lookup(const float* from, Ints lanes) { return {from[lanes.v]}; }

}  // namespace riformer::RIFORMER_ISA
