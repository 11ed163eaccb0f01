// AVX-512 F, BW, DQ, VL and BF16: bfloat16 products for bfloat16 tokens, float32 products for the others.
#include <cstdlib>

#define RIFORMER_ISA avx512
#define RIFORMER_GEMM_ROWS 8
#define RIFORMER_GEMM_VECTORS 3
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_avx512.h"
#include "vec_math.h"
// Below here everything is written once, for the vector type above.
#include "gemm.h"

namespace riformer::avx512 {
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
}  // namespace riformer::avx512

#include "block.h"
#include "embed.h"
#include "head.h"
#include "norm.h"

namespace riformer::cpu {
const Kernels kAvx512Kernels = {"avx512", avx512::moments, avx512::embed, avx512::block, avx512::norm, avx512::head};
}
