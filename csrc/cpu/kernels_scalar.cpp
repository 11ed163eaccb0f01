// The instruction set "scalar": plain C++, for any machine.
#define RIFORMER_ISA scalar
#define RIFORMER_GEMM_ROWS 4
#define RIFORMER_GEMM_VECTORS 8
#define RIFORMER_TASK_BYTES (128 * 1024)

#include "vec_scalar.h"
#include "ints_scalar.h"
#include "gemm.h"

namespace riformer::scalar {
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
}  // namespace riformer::scalar

#include "all_kernels.h"
