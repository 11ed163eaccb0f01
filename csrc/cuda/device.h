// The machine as the kernels see it: threads, barriers, shared memory, copies and the matrix instructions of sm_80.
// What sm_90a adds is in hopper.h.
//
// Every function here has two forms: PTX for nvcc, and a call of the emulator (csrc/emulator) for a C++ compiler.
// Kernels use these functions and no CUDA of their own. So the same source runs on a GPU and, thread by thread, on the
// CPU, where everything is tested but the instructions themselves.
//
// The PTX is written here and not taken from CuTe for two reasons. The emulator has to replace each instruction, which
// it could not do inside CuTe. And CuTe's headers add half a minute to the compilation of every kernel.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../common/dtypes.h"
#include "kernels.h"

#if defined(__CUDACC__)
#define RIFORMER_DEVICE __device__ __forceinline__
#define RIFORMER_HOST_DEVICE __host__ __device__ __forceinline__
// `threads`: of a thread block. `per_multiprocessor`: how many thread blocks have to fit on one multiprocessor at a
// time, which limits the registers of a thread.
#define RIFORMER_KERNEL(threads, per_multiprocessor) __global__ void __launch_bounds__(threads, per_multiprocessor)
#define RIFORMER_GRID_CONSTANT const __grid_constant__
#define RIFORMER_UNROLL _Pragma("unroll")
#define RIFORMER_NO_UNROLL _Pragma("unroll 1")
#else
#include "../emulator/emulator.h"
#define RIFORMER_DEVICE inline
#define RIFORMER_HOST_DEVICE inline
#define RIFORMER_KERNEL(threads, per_multiprocessor) void
#define RIFORMER_GRID_CONSTANT const
#define RIFORMER_UNROLL
#define RIFORMER_NO_UNROLL
#endif

namespace riformer::cuda {

constexpr int kWarp = 32;

template <class T>
constexpr int kElementBytes = static_cast<int>(sizeof(T));

// What the functions below that tell elements apart by their size know: four bytes are a float, two are a type that
// pack() makes.
template <class T>
constexpr bool kIsFloatOr16Bit = std::is_same_v<T, float> || sizeof(T) == 2;

// A piece: 16 bytes of a row, which one instruction loads, stores or copies. Everywhere in csrc/cuda "piece" means
// this.
struct alignas(16) Vec16 {
  uint32_t word[4];
};
template <class T>
constexpr int kPerPiece = 16 / kElementBytes<T>;

#if defined(__CUDACC__)

RIFORMER_DEVICE int thread_index() { return threadIdx.x; }
RIFORMER_DEVICE int64_t thread_block_index() { return blockIdx.x; }
RIFORMER_DEVICE int64_t thread_block_count() { return gridDim.x; }
RIFORMER_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char riformer_shared[];
  return riformer_shared;
}
RIFORMER_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

RIFORMER_DEVICE void sync_thread_block() { __syncthreads(); }
RIFORMER_DEVICE void sync_warp() { __syncwarp(); }
// Barrier `id` (1 to 15) among `threads` threads of the thread block, which are whole warps.
RIFORMER_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
RIFORMER_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
RIFORMER_DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Starts the copy of a piece from global to shared memory. If not `valid`, zeros are written and nothing is read.
RIFORMER_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
RIFORMER_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` groups of this thread's copies are still under way.
template <int Pending>
RIFORMER_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit values (PTX: ldmatrix.x4). Lane l gives the address of row l % 8 of matrix l / 8.
// Of each matrix lane l receives row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1.
RIFORMER_DEVICE void load_matrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8), sums in float32, by one warp. The fragments of lane l are those of the PTX
// manual, "Matrix Fragments for mma.m16n8k16". With g = l / 4 and i = 2 (l % 4):
//   d[0], d[1]: row g, columns i and i + 1.   d[2], d[3]: row g + 8, the same columns.
//   a[0]: row g, k = i and i + 1.   a[1]: row g + 8.   a[2] and a[3]: like a[0] and a[1] with k + 8.
//   b[0]: column g, k = i and i + 1.   b[1]: the same with k + 8.
template <class T>
RIFORMER_DEVICE void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
RIFORMER_DEVICE void multiply_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
RIFORMER_DEVICE void multiply_16x8x16<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

RIFORMER_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Returns `value` and hides from the compiler where it came from. What depends on it is then computed where it is used,
// and not once before a loop, where it would occupy registers that the loop needs.
RIFORMER_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Two 16-bit values of T in a word, the first in the low half; round to nearest even.
template <class T>
RIFORMER_DEVICE uint32_t pack(float low, float high);
template <>
RIFORMER_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
RIFORMER_DEVICE uint32_t pack<f16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
// The value whose 16 bits are the low half of `bits`.
template <class T>
RIFORMER_DEVICE float unpack_one(uint32_t bits);
template <>
RIFORMER_DEVICE float unpack_one<bf16>(uint32_t bits) {
  return __uint_as_float(bits << 16);
}
template <>
RIFORMER_DEVICE float unpack_one<f16>(uint32_t bits) {
  float out;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(out) : "r"(bits & 0xffff));
  return out;
}

#else

RIFORMER_DEVICE int thread_index() { return emulator::thread_index(); }
RIFORMER_DEVICE int64_t thread_block_index() { return emulator::thread_block_index(); }
RIFORMER_DEVICE int64_t thread_block_count() { return emulator::thread_block_count(); }
RIFORMER_DEVICE unsigned char* shared_memory() { return emulator::shared_memory(); }
RIFORMER_DEVICE uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }
RIFORMER_DEVICE void sync_thread_block() { emulator::sync_thread_block(); }
RIFORMER_DEVICE void sync_warp() { emulator::sync_warp(); }
RIFORMER_DEVICE void sync_named(int id, int threads) { emulator::sync_named(id, threads); }
RIFORMER_DEVICE float shuffle_xor(float value, int mask) { return emulator::shuffle_xor(value, mask); }
RIFORMER_DEVICE int shuffle_xor(int value, int mask) {
  float bits;
  std::memcpy(&bits, &value, 4);
  bits = emulator::shuffle_xor(bits, mask);
  std::memcpy(&value, &bits, 4);
  return value;
}
RIFORMER_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  emulator::copy_async_16(shared, global, valid);
}
RIFORMER_DEVICE void copy_async_commit() { emulator::copy_async_commit(); }
template <int Pending>
RIFORMER_DEVICE void copy_async_wait() {
  emulator::copy_async_wait(Pending);
}
RIFORMER_DEVICE void load_matrix_x4(uint32_t (&out)[4], const void* row) { emulator::load_matrix_x4(out, row); }
template <class T>
RIFORMER_DEVICE void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::multiply_16x8x16(d, a, b, ElementTraits<T>::kDType);
}
RIFORMER_DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
RIFORMER_DEVICE int opaque(int value) { return value; }
template <class T>
RIFORMER_DEVICE uint32_t pack(float low, float high) {
  T first, second;
  narrow(low, first);
  narrow(high, second);
  return first.bits | static_cast<uint32_t>(second.bits) << 16;
}
template <class T>
RIFORMER_DEVICE float unpack_one(uint32_t bits) {
  return widen(T{static_cast<uint16_t>(bits)});
}

#endif

template <class T>
RIFORMER_DEVICE float unpack_low(uint32_t word) {
  return unpack_one<T>(word & 0xffff);
}
template <class T>
RIFORMER_DEVICE float unpack_high(uint32_t word) {
  return unpack_one<T>(word >> 16);
}

// Single values of any element type, for kernels that do little arithmetic. A type without an overload of to_float does
// not compile.
template <class T>
float to_float(T) = delete;
RIFORMER_DEVICE float to_float(float value) { return value; }
RIFORMER_DEVICE float to_float(bf16 value) { return unpack_one<bf16>(value.bits); }
RIFORMER_DEVICE float to_float(f16 value) { return unpack_one<f16>(value.bits); }
template <class T>
RIFORMER_DEVICE T from_float(float value) {
  static_assert(sizeof(T) == 2, "pack() makes 16-bit values");
  return T{static_cast<uint16_t>(pack<T>(value, 0.f))};
}
template <>
RIFORMER_DEVICE float from_float<float>(float value) {
  return value;
}

// Loads and stores of a known alignment. A memcpy would not do: where the compiler does not know the alignment it loads
// byte by byte.
struct alignas(8) Pair {
  float value[2];
};
RIFORMER_DEVICE Pair load_pair(const float* address) { return *reinterpret_cast<const Pair*>(address); }
RIFORMER_DEVICE uint32_t load_word(const void* address) { return *static_cast<const uint32_t*>(address); }
RIFORMER_DEVICE void store_word(void* address, uint32_t word) { *static_cast<uint32_t*>(address) = word; }
RIFORMER_DEVICE Vec16 load_16(const void* address) { return *static_cast<const Vec16*>(address); }
RIFORMER_DEVICE void store_16(void* address, const Vec16& value) { *static_cast<Vec16*>(address) = value; }

[[noreturn]] inline void fail_unserved_dtype(const char* name) {
  throw std::logic_error(std::string("riformer: the CUDA kernels do not serve ") + name);
}

// with_dtype (csrc/common/dtypes.h) for the dtypes that the CUDA kernels serve. Fails by name on any other.
template <class F>
inline auto with_served_dtype(DType dtype, const F& f) {
  return with_dtype(dtype, [&](auto element) -> decltype(f(float{})) {
    using Traits = ElementTraits<decltype(element)>;
    if constexpr (kernels_serve(Traits::kDType))
      return f(element);
    else
      fail_unserved_dtype(Traits::kName);
  });
}

// with_served_dtype for device code: calls f with a value of the element type that `dtype` names. A kernel cannot fail
// on an unknown dtype, so launchers check what they pass on (check_dtypes in launch.h). The last type has no test of
// its own on a GPU: a path for "unknown" would be one more exit of the loops around this, and nvcc does not unroll such
// loops.
template <class F>
RIFORMER_DEVICE auto with_dtype_on_device(DType dtype, const F& f) {
#if defined(__CUDACC__)
  static_assert(kServedDTypeCount == 3, "a dtype without a line here would be read as the last one");
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::bf16) return f(bf16{});
  return f(f16{});
#else
  return with_served_dtype(dtype, f);
#endif
}

// There is one load for all 16-bit types, and not one for each.
RIFORMER_DEVICE float load_parameter(const Parameter& parameter, int64_t index) {
  if (parameter.dtype == DType::f32) return static_cast<const float*>(parameter.data)[index];
  const uint32_t bits = static_cast<const uint16_t*>(parameter.data)[index];
  return with_dtype_on_device(parameter.dtype, [=](auto element) {
    static_assert(kIsFloatOr16Bit<decltype(element)>, "an element of another kind needs a load of its own");
    if constexpr (sizeof(element) == 2)
      return unpack_one<decltype(element)>(bits);
    else
      return 0.f;  // never reached: float32 has returned above
  });
}

}  // namespace riformer::cuda
