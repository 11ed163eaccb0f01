// The instruction set "avx512_bf16": AVX-512 F, BW, DQ, VL and BF16. bfloat16 products for bfloat16 tokens, float32
// products for the others.
#define RIFORMER_ISA avx512_bf16
#define RIFORMER_GEMM_ROWS 8
#define RIFORMER_GEMM_VECTORS 3
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_avx512.h"
#include "ints_avx512.h"
#include "gemm_avx512_bf16.h"

namespace riformer::avx512_bf16 {
template <>
struct GemmFor<float> {
  using Type = GemmFloat32;
};
template <>
struct GemmFor<bf16> {
  using Type = GemmBfloat16;
};
template <>
struct GemmFor<f16> {
  using Type = GemmFloat32;
};
}  // namespace riformer::avx512_bf16

#include "all_kernels.h"
