// The instruction set "amx": AMX bf16 tiles for bfloat16 tokens, everything else as AVX-512. Compiled once more with
// RIFORMER_AMX_EMULATED as "amx-emulated", whose tile registers are emulated in memory.
//
// The empty namespaces make this file the one that a search for "namespace riformer::amx" finds. All that is in them is
// written as RIFORMER_ISA.
#ifdef RIFORMER_AMX_EMULATED
namespace riformer::amx_emulated {}
#define RIFORMER_ISA amx_emulated
#else
namespace riformer::amx {}
#define RIFORMER_ISA amx
#endif
#define RIFORMER_GEMM_ROWS 8
#define RIFORMER_GEMM_VECTORS 3
#define RIFORMER_TASK_BYTES (512 * 1024)

#include "vec_avx512.h"
#include "ints_avx512.h"
#include "gemm_amx.h"

namespace riformer::RIFORMER_ISA {
template <>
struct GemmFor<float> {
  using Type = GemmFloat32;
};
template <>
struct GemmFor<bf16> {
  using Type = GemmAmx;
};
template <>
struct GemmFor<f16> {
  using Type = GemmFloat32;
};
}  // namespace riformer::RIFORMER_ISA

#include "all_kernels.h"
