// The instruction set "avx2_vnni": AVX2, FMA, F16C and AVX-VNNI. float32 products for every dtype, and int8 products.
#define RIFORMER_ISA avx2_vnni
#define RIFORMER_GEMM_ROWS 4
#define RIFORMER_GEMM_VECTORS 3
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_avx2.h"
#include "ints_avx2.h"
#include "gemm.h"

namespace riformer::avx2_vnni {
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
}  // namespace riformer::avx2_vnni

#include "all_kernels.h"
