// Integers for the int8 products on Arm: eight lanes, lane by lane in plain C++ (ints_scalar.h says what each function
// must compute). Right, and left to the compiler: baseline ARMv8-A has no product of unsigned with signed bytes, and
// those of FEAT_DotProd and FEAT_I8MM have no set of their own yet.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace riformer::RIFORMER_ISA {

struct Ints {
  int32_t v[Vec::kLanes];

  static Ints zero() { return {}; }
  template <class T>
  static Ints load(const T* from) {
    Ints loaded;
    std::memcpy(loaded.v, from, sizeof(loaded.v));
    return loaded;
  }
  static Ints broadcast(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof(four));
    Ints all;
    for (int32_t& lane : all.v) lane = four;
    return all;
  }
};

inline void add_dot(Ints& sums, Ints bytes, Ints weights) {
  for (int lane = 0; lane < Vec::kLanes; ++lane)
    for (int shift = 0; shift < 32; shift += 8)
      sums.v[lane] += static_cast<int32_t>(static_cast<uint32_t>(bytes.v[lane]) >> shift & 255) *
                      static_cast<int8_t>(static_cast<uint32_t>(weights.v[lane]) >> shift);
}

inline void store(Ints a, int32_t* to) { std::memcpy(to, a.v, sizeof(a.v)); }
inline Vec load_whole(const int32_t* from) {
  float values[Vec::kLanes];
  for (int lane = 0; lane < Vec::kLanes; ++lane) values[lane] = static_cast<float>(from[lane]);
  return Vec::load(values);
}

// NaN and infinity become 0, as a conversion of them is undefined. Their scales are not finite, and carry them on.
inline int32_t whole(float a) { return std::fabs(a) < 1e6f ? static_cast<int32_t>(std::nearbyint(a)) : 0; }
inline int lanes_of(AllLanes) { return Vec::kLanes; }
inline int lanes_of(int n) { return n; }
template <class Lanes>
inline void put_bytes(uint8_t* to, Vec a, Vec b, Vec c, Vec d, Lanes lanes) {
  float four[4][Vec::kLanes];
  a.store(four[0]);
  b.store(four[1]);
  c.store(four[2]);
  d.store(four[3]);
  for (int lane = 0; lane < lanes_of(lanes); ++lane)
    for (int i = 0; i < 4; ++i) to[4 * lane + i] = static_cast<uint8_t>(whole(four[i][lane]));
}
template <class Lanes>
inline void put_signed(int8_t* to, Vec a, Lanes lanes) {
  float values[Vec::kLanes];
  a.store(values);
  for (int lane = 0; lane < lanes_of(lanes); ++lane) to[lane] = static_cast<int8_t>(whole(values[lane]));
}

// Applies a function of two numbers to each lane.
template <class Function>
inline Vec lane_by_lane(Vec a, Vec b, Function function) {
  float left[Vec::kLanes], right[Vec::kLanes];
  a.store(left);
  b.store(right);
  for (int lane = 0; lane < Vec::kLanes; ++lane) left[lane] = function(left[lane], right[lane]);
  return Vec::load(left);
}
inline Vec larger(Vec a, Vec b) {
  return lane_by_lane(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline Vec smaller(Vec a, Vec b) {
  return lane_by_lane(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline Vec larger_size(Vec a, Vec b) {
  return lane_by_lane(a, b, [](float x, float y) { return x >= std::fabs(y) || x != x ? x : std::fabs(y); });
}
inline float largest_size(Vec a) {
  float values[Vec::kLanes], largest = 0;
  a.store(values);
  for (const float value : values)
    largest = largest >= std::fabs(value) || largest != largest ? largest : std::fabs(value);
  return largest;
}

inline Vec lookup(const float* from, Ints lanes) {
  float values[Vec::kLanes];
  for (int lane = 0; lane < Vec::kLanes; ++lane) values[lane] = from[lanes.v[lane]];
  return Vec::load(values);
}

}  // namespace riformer::RIFORMER_ISA
