// Plain C++: any machine.
#include <cstdlib>

#define RIFORMER_ISA scalar
#define RIFORMER_GEMM_ROWS 4
#define RIFORMER_GEMM_VECTORS 8
#define RIFORMER_TASK_BYTES (128 * 1024)

#include "vec_scalar.h"
#include "vec_math.h"
// Below here everything is written once, for the vector type above.
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

#include "block.h"
#include "embed.h"
#include "head.h"
#include "norm.h"

namespace riformer::cpu {
const Kernels kScalarKernels = {"scalar", scalar::moments, scalar::embed, scalar::block, scalar::norm, scalar::head};
}
