// Weights from one dtype to another.
#pragma once

#include "launch.h"
#include "statistics.h"

namespace riformer::cuda {

constexpr int kConvertThreads = 256, kConvertValues = 8;

struct ConvertArgs {
  const void* from;
  void* to;
  int64_t count;
  bool aligned;  // both pointers on 16-byte boundaries
};

// Eight values a thread, in loads and stores of 16 bytes where the pointers allow it: memory bounds it.
template <class From, class To>
RIFORMER_KERNEL(kConvertThreads, 4)
convert_kernel(RIFORMER_GRID_CONSTANT ConvertArgs args) {
  const int64_t first = (block_index() * kConvertThreads + thread_index()) * kConvertValues;
  const From* const from = static_cast<const From*>(args.from) + first;
  To* const to = static_cast<To*>(args.to) + first;
  if (args.aligned && first + kConvertValues <= args.count) {
    float values[kConvertValues], some[kPerPiece<From>];
    RIFORMER_UNROLL
    for (int i = 0; i < kConvertValues; i += kPerPiece<From>) {
      unpack_piece<From>(load_16(from + i), some);
      RIFORMER_UNROLL
      for (int j = 0; j < kPerPiece<From>; ++j) values[i + j] = some[j];
    }
    RIFORMER_UNROLL
    for (int i = 0; i < kConvertValues; i += kPerPiece<To>) store_16(to + i, pack_piece<To>(values + i));
    return;
  }
  for (int i = 0; i < kConvertValues && first + i < args.count; ++i) to[i] = from_float<To>(to_float(from[i]));
}

template <class From>
void launch_convert_of(const Device& device, DType to, const ConvertArgs& args) {
  const Launch how{
      "convert",    ceil_divide(args.count, int64_t{kConvertThreads} * kConvertValues), kConvertThreads, 0, 1,
      device.stream};
  if (to == DType::f32) launch(convert_kernel<From, float>, how, args);
  if (to == DType::bf16) launch(convert_kernel<From, bf16>, how, args);
  if (to == DType::f16) launch(convert_kernel<From, f16>, how, args);
}

inline void launch_convert(const Device& device, const void* from, DType from_dtype, void* to, DType to_dtype,
                           int64_t count) {
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  const ConvertArgs args{from, to, count, aligned};
  if (from_dtype == DType::f32) launch_convert_of<float>(device, to_dtype, args);
  if (from_dtype == DType::bf16) launch_convert_of<bf16>(device, to_dtype, args);
  if (from_dtype == DType::f16) launch_convert_of<f16>(device, to_dtype, args);
}

}  // namespace riformer::cuda
