// The instruction set "neon_bf16": Advanced SIMD with FEAT_BF16 (Neoverse V1, N2 and later). bfloat16 products for
// bfloat16 tokens, float32 products for the others.
#define RIFORMER_ISA neon_bf16
#define RIFORMER_GEMM_ROWS 4
#define RIFORMER_GEMM_VECTORS 2
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_neon.h"
#include "ints_neon.h"
#include "gemm_neon.h"
#include "gemm_neon_bf16.h"

namespace riformer::neon_bf16 {
template <>
struct GemmFor<float> {
  using Type = GemmByElement;
};
template <>
struct GemmFor<bf16> {
  using Type = GemmBfloat16;
};
template <>
struct GemmFor<f16> {
  using Type = GemmByElement;
};
}  // namespace riformer::neon_bf16

#include "all_kernels.h"
