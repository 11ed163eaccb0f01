// The vector type of the Arm kernels: eight float32 lanes in two registers of Advanced SIMD (NEON), which every ARMv8-A
// server has. Uses BF16 where it may. Two registers, so that the chains of dependent instructions in GELU and in the
// norms come in pairs, and loops over short rows take half the turns.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "../common/dtypes.h"

namespace riformer::RIFORMER_ISA {

struct Vec {
  static constexpr int kLanes = 8;
  float32x4_t low, high;

  static Vec broadcast(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
  static Vec zero() { return broadcast(0.f); }

  static Vec load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  static Vec load(const bf16* from) {
    const uint16x8_t bits = vld1q_u16(reinterpret_cast<const uint16_t*>(from));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16))};
  }
  static Vec load(const f16* from) {
    const float16x8_t values = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(from)));
    return {vcvt_f32_f16(vget_low_f16(values)), vcvt_high_f32_f16(values)};
  }
  // There are no masked moves: partial vectors go through a buffer on the stack.
  template <class T>
  static Vec load_n(const T* from, int n) {
    if (n >= kLanes) return load(from);
    T buffer[kLanes] = {};
    copy_lanes(from, n, buffer);
    return load(buffer);
  }

  void store(float* to) const {
    vst1q_f32(to, low);
    vst1q_f32(to + 4, high);
  }
  void store(bf16* to) const { vst1q_u16(reinterpret_cast<uint16_t*>(to), narrow_bf16()); }
  void store(f16* to) const {
    const float16x8_t values = vcvt_high_f16_f32(vcvt_f16_f32(low), high);
    vst1q_u16(reinterpret_cast<uint16_t*>(to), vreinterpretq_u16_f16(values));
  }
  template <class T>
  void store_n(T* to, int n) const {
    if (n >= kLanes) {
      store(to);
      return;
    }
    T buffer[kLanes];
    store(buffer);
    copy_lanes(buffer, n, to);
  }

  float sum() const { return vaddvq_f32(vaddq_f32(low, high)); }

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  uint16x8_t narrow_bf16() const { return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high)); }
#else
  // As common/dtypes.h rounds: to nearest even, NaN stays NaN.
  static uint16x4_t rounded_bf16(float32x4_t value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16);
  }
  uint16x8_t narrow_bf16() const { return vcombine_u16(rounded_bf16(low), rounded_bf16(high)); }
#endif

 private:
  // Copies n < kLanes elements in at most three moves. In a loop GCC would call memcpy for them.
  template <class T>
  static void copy_lanes(const T* from, int n, T* to) {
    int done = 0;
    if (n & 4) {
      std::memcpy(static_cast<void*>(to), from, 4 * sizeof(T));
      done = 4;
    }
    if (n & 2) {
      std::memcpy(static_cast<void*>(to + done), from + done, 2 * sizeof(T));
      done += 2;
    }
    if (n & 1) to[done] = from[done];
  }
};

inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
// NaN stays NaN, as these instructions return it whichever operand it is.
inline Vec max(Vec a, Vec b) { return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)}; }
inline Vec min(Vec a, Vec b) { return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)}; }
inline Vec clamp(Vec a, Vec low, Vec high) { return min(max(a, low), high); }
inline Vec abs(Vec a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }

// Two Newton steps on the 8-bit estimate: five instructions of which one can start in every cycle or two. Neoverse
// cores take a division of four lanes every 4 to 10 cycles.
inline float32x4_t reciprocal(float32x4_t a) {
  const float32x4_t one = vdupq_n_f32(1.f);
  float32x4_t r = vrecpeq_f32(a);
  r = vfmaq_f32(r, r, vfmsq_f32(one, a, r));
  return vfmaq_f32(r, r, vfmsq_f32(one, a, r));
}
inline Vec reciprocal(Vec a) { return {reciprocal(a.low), reciprocal(a.high)}; }
inline float32x4_t rsqrt(float32x4_t a) { return vdivq_f32(vdupq_n_f32(1.f), vsqrtq_f32(a)); }
inline Vec rsqrt(Vec a) { return {rsqrt(a.low), rsqrt(a.high)}; }
inline Vec if_negative(Vec x, Vec a, Vec b) {
  return {vbslq_f32(vcltzq_f32(x.low), a.low, b.low), vbslq_f32(vcltzq_f32(x.high), a.high, b.high)};
}
inline Vec lane_sums(const Vec* v) {
  float32x4_t half[8];  // four lanes for each sum
  for (int i = 0; i < 8; ++i) half[i] = vaddq_f32(v[i].low, v[i].high);
  const float32x4_t low = vpaddq_f32(vpaddq_f32(half[0], half[1]), vpaddq_f32(half[2], half[3]));
  const float32x4_t high = vpaddq_f32(vpaddq_f32(half[4], half[5]), vpaddq_f32(half[6], half[7]));
  return {low, high};
}
inline float32x4_t keep_n(float32x4_t v, int n, int32x4_t lane) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vcltq_s32(lane, vdupq_n_s32(n))));
}
inline Vec keep_n(Vec v, int n) {
  const int32x4_t first = {0, 1, 2, 3};
  return {keep_n(v.low, n, first), keep_n(v.high, n - 4, first)};
}

inline Vec nearest(Vec a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
// a * 2^whole for whole numbers in [-126, 127], by adding to the exponent
inline float32x4_t scale_exponent(float32x4_t a, float32x4_t whole) {
  const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(vmaxq_f32(whole, vdupq_n_f32(-126.f))), 23);
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), exponent));
}
inline Vec scale_exponent(Vec a, Vec whole) {
  return {scale_exponent(a.low, whole.low), scale_exponent(a.high, whole.high)};
}

}  // namespace riformer::RIFORMER_ISA
