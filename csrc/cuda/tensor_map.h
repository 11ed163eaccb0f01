// Tensor maps: what the copy engine has to know of a matrix in global memory. They are made on the host at each launch,
// by a call of the driver that touches no GPU and takes about a microsecond. Keeping them would mean to notice every
// change of a pointer.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "hopper.h"
#include "launch.h"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#endif

namespace riformer::cuda {

constexpr int64_t kMostRows = 2147483647;  // the copy engine's coordinates are 32-bit

#if defined(__CUDACC__)

// The driver's function, looked up through the runtime so that the library does not link against the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
          [] { return "looking for cuTensorMapEncodeTiled"; });
    if (!function || result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("riformer: the NVIDIA driver has no cuTensorMapEncodeTiled; it is older than CUDA 12");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

// A type without a specialisation here does not compile.
template <class T>
struct TensorMapFormat;
template <>
struct TensorMapFormat<bf16> {
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
};
template <>
struct TensorMapFormat<f16> {
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
};

#endif

// A row-major [rows, columns] matrix of T, and the box that one copy takes of it. A row of the box has 128 or 64 bytes,
// which is also the width of the swizzle.
template <class T>
inline TensorMap tensor_map(const void* base, int64_t rows, int64_t columns, int box_rows, int box_columns) {
  if (rows > kMostRows)
    throw std::runtime_error("riformer: " + std::to_string(rows) + " rows of tokens in one call; split the batch");
#if defined(__CUDACC__)
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(kElementBytes<T> * columns)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = tensor_map_encoder()(
      &map, TensorMapFormat<T>::kType, 2, const_cast<void*>(base), sizes, pitch, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      kElementBytes<T> * box_columns == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("riformer: no tensor map for a [" + std::to_string(rows) + ", " + std::to_string(columns) +
                             "] matrix with boxes of " + std::to_string(box_rows) + " x " +
                             std::to_string(box_columns) + ": the driver returned error " +
                             std::to_string(static_cast<int>(status)));
  return map;
#else
  if (reinterpret_cast<uintptr_t>(base) % 16 || kElementBytes<T> * columns % 16 || box_rows > 256)
    throw std::runtime_error("riformer: a matrix that the copy engine cannot describe");
  return {base, columns, rows, kElementBytes<T>, box_columns, box_rows};
#endif
}

}  // namespace riformer::cuda
