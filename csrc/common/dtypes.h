// Storage types of tensors and their scalar conversions (round to nearest even), shared by host and device code.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace riformer {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The numbers are part of the interface with Python (riformer_kernels/dtypes.py), and the places in kDTypes.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr int kDTypeCount = static_cast<int>(sizeof(kDTypes) / sizeof(kDTypes[0]));

// What the kernels ask of an element type. A new dtype is an entry here, in DType, in kDTypes and in with_dtype.
template <class T>
struct ElementTraits;
template <>
struct ElementTraits<float> {
  static constexpr DType kDType = DType::f32;
  static constexpr const char* kName = "float32";
};
template <>
struct ElementTraits<bf16> {
  static constexpr DType kDType = DType::bf16;
  static constexpr const char* kName = "bfloat16";
};
template <>
struct ElementTraits<f16> {
  static constexpr DType kDType = DType::f16;
  static constexpr const char* kName = "float16";
};

// Everything here is static: the same header is compiled for several instruction sets, and a shared copy could be the
// one that this machine cannot run. For the same reason nothing here uses the inline functions of the standard library.

[[noreturn]] static inline void fail_unknown_dtype(DType dtype) {
  char text[120];
  std::snprintf(text, sizeof(text),
                "riformer: dtype %d has no element type; add it to with_dtype (csrc/common/dtypes.h)",
                static_cast<int>(dtype));
  throw std::logic_error(text);
}

// Calls f with a value of the element type that `dtype` names: with_dtype(dtype, [&](auto element) { using T =
// decltype(element); ... }). The switch has no default, so that the compiler reports a DType without a case.
template <class F>
static constexpr auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
  fail_unknown_dtype(dtype);
}

// What follows finds a dtype that some of the lists above lack.
static constexpr bool is_listed(DType wanted) {
  for (const DType dtype : kDTypes)
    if (dtype == wanted) return true;
  return false;
}

struct DTypeOf {
  template <class T>
  constexpr DType operator()(T) const {
    static_assert(is_listed(ElementTraits<T>::kDType), "with_dtype has a case for a dtype that kDTypes lacks");
    return ElementTraits<T>::kDType;
  }
};

static constexpr bool dtypes_agree() {
  for (int i = 0; i < kDTypeCount; ++i)
    if (static_cast<int>(kDTypes[i]) != i || with_dtype(kDTypes[i], DTypeOf{}) != kDTypes[i]) return false;
  return true;
}
static_assert(dtypes_agree(), "kDTypes are in the order of their numbers, and an element's traits name its own DType");

// with_dtype for two dtypes at once.
template <class F>
static inline auto with_dtypes(DType first, DType second, F&& f) {
  return with_dtype(first, [&](auto a) { return with_dtype(second, [&](auto b) { return f(a, b); }); });
}

static inline int64_t size_of(DType dtype) {
  return with_dtype(dtype, [](auto element) { return static_cast<int64_t>(sizeof(element)); });
}

// The value of an element in float32. A type without an overload does not compile: its values would be converted to a
// type that has one, without a word.
template <class T>
float widen(T) = delete;
static inline float widen(float value) { return value; }
static inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
static inline float widen(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | ((magnitude & 0x3ff) << 13);
  } else if (magnitude >= 0x0400) {
    bits = sign | ((magnitude << 13) + 0x38000000);
  } else {
    const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &subnormal, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// The element that is nearest to a float32 value. A type without an overload does not compile.
template <class T>
void narrow(float, T&) = delete;
static inline void narrow(float value, float& out) { out = value; }
static inline void narrow(float value, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out.bits = static_cast<uint16_t>((bits >> 16) | 0x40);
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void narrow(float value, f16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out.bits = static_cast<uint16_t>(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    out.bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (magnitude >= 0x38800000) {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    out.bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
  } else {
    // Adding 0.5 to a magnitude below 2^-14 leaves it, in units of 2^-24 and rounded to even, in the low bits.
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    uint32_t low;
    std::memcpy(&low, &shifted, 4);
    out.bits = static_cast<uint16_t>(sign | (low - 0x3f000000));
  }
}

}  // namespace riformer
