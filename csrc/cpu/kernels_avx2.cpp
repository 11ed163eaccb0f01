// AVX2, FMA and F16C: float32 products for every dtype.
#include <cstdlib>

#define RIFORMER_ISA avx2
#define RIFORMER_GEMM_ROWS 4
#define RIFORMER_GEMM_VECTORS 3
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_avx2.h"
#include "vec_math.h"
// Below here everything is written once, for the vector type above.
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

#include "block.h"
#include "embed.h"
#include "head.h"
#include "norm.h"

namespace riformer::cpu {
const Kernels kAvx2Kernels = {"avx2", avx2::moments, avx2::embed, avx2::block, avx2::norm, avx2::head};
}
