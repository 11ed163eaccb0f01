// The block kernels for sm_80 and what follows it, all dtypes. Compiled by nvcc, and as C++ for the emulator.
#include "block_float32.h"
#include "block_sm80.h"
#include "product_sm80.h"

namespace riformer::cuda {

template void launch_fused_sm80<bf16>(const BlockKernelArgs& args, const Device& device);
template void launch_fused_sm80<f16>(const BlockKernelArgs& args, const Device& device);
template void launch_two_kernels_sm80<bf16>(const BlockKernelArgs& args, const Device& device);
template void launch_two_kernels_sm80<f16>(const BlockKernelArgs& args, const Device& device);

}  // namespace riformer::cuda
