// The instruction set "avx512_vnni": AVX-512 F, BW, DQ, VL and VNNI, without BF16. float32 products for every dtype,
// and int8 products.
#define RIFORMER_ISA avx512_vnni
#define RIFORMER_GEMM_ROWS 8
#define RIFORMER_GEMM_VECTORS 3
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_avx512.h"
#include "ints_avx512.h"
#include "gemm.h"

namespace riformer::avx512_vnni {
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
}  // namespace riformer::avx512_vnni

#include "all_kernels.h"
