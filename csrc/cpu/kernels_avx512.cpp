// The instruction set "avx512": AVX-512 F, BW, DQ and VL, without BF16. float32 products for every dtype.
#define RIFORMER_ISA avx512
#define RIFORMER_GEMM_ROWS 8
#define RIFORMER_GEMM_VECTORS 3
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_avx512.h"
#include "ints_avx512.h"
#include "gemm.h"

namespace riformer::avx512 {
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
}  // namespace riformer::avx512

#include "all_kernels.h"
