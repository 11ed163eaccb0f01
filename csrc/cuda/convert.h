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

// A thread converts eight values, in pieces where both pointers are aligned.
template <class From, class To>
RIFORMER_KERNEL(kConvertThreads, 4)
convert_kernel(RIFORMER_GRID_CONSTANT ConvertArgs args) {
  const int64_t first = (thread_block_index() * kConvertThreads + thread_index()) * kConvertValues;
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

inline void launch_convert(const Device& device, const void* from, DType from_dtype, void* to, DType to_dtype,
                           int64_t count) {
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  const ConvertArgs args{from, to, count, aligned};
  const int64_t thread_blocks = ceil_divide(count, int64_t{kConvertThreads} * kConvertValues);
  const Launch how{"convert", thread_blocks, kConvertThreads, 0, 1, device.stream};
  with_served_dtype(from_dtype, [&](auto from_element) {
    with_served_dtype(to_dtype, [&](auto to_element) {
      launch(convert_kernel<decltype(from_element), decltype(to_element)>, how, args);
    });
  });
}

}  // namespace riformer::cuda
