// The instruction set "neon": Advanced SIMD, which every ARMv8-A server has. float32 products for every dtype.
#define RIFORMER_ISA neon
#define RIFORMER_GEMM_ROWS 4
#define RIFORMER_GEMM_VECTORS 2
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_neon.h"
#include "ints_neon.h"
#include "gemm_neon.h"

namespace riformer::neon {
template <>
struct GemmFor<float> {
  using Type = GemmByElement;
};
template <>
struct GemmFor<bf16> {
  using Type = GemmByElement;
};
template <>
struct GemmFor<f16> {
  using Type = GemmByElement;
};
}  // namespace riformer::neon

#include "all_kernels.h"
