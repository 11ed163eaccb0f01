// The instruction set "avx2": AVX2, FMA and F16C. float32 products for every dtype.
#define RIFORMER_ISA avx2
#define RIFORMER_GEMM_ROWS 4
#define RIFORMER_GEMM_VECTORS 3
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_avx2.h"
#include "ints_avx2.h"
#include "gemm.h"

namespace riformer::avx2 {
template <>
struct GemmFor<float> {
  using Type = GemmFloat32;
};
template <>
struct GemmFor<bf16> {
  using Type = GemmFloat32;
};
template <>
struct GemmFor<f16> {
  using Type = GemmFloat32;
};
}  // namespace riformer::avx2

#include "all_kernels.h"
