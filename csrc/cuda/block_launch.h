// Starts the kernels of a block, a family each for sm_80, sm_90 and float32, and says in words which they would be. The
// kernels are in block_sm80.cu and block_sm90.cu; block.cu, which chooses among them, needs this header alone.
//
// Every pointer in the arguments is 16-byte aligned. Slots that cross images (0 slots per image) are for images of
// fewer than 2^31 positions.
#pragma once

#include <string>

#include "block_args.h"
#include "block_choice.h"

namespace riformer::cuda {

// For sm_80 and everything that runs its code. 16-bit tokens: other dtypes fail by name.
void launch_block_sm80(BlockForm form, DType dtype, const BlockKernelArgs& args, const Device& device);
std::string describe_block_sm80(BlockForm form, int64_t channels);

// Whether the fused kernel of sm_80 takes these widths.
bool fused_sm80_serves(int64_t channels, int64_t hidden);

// Whether the fused kernel of sm_80 keeps at least half of the multiprocessors at work on so many slots. With fewer
// slots the pair of kernels spreads the work over more multiprocessors. An estimate.
bool fused_sm80_fills(int64_t channels, int64_t slots, int processors);

// For sm_90. 16-bit tokens: other dtypes fail by name. Fails if has_sm90() is false.
void launch_block_sm90(BlockForm form, DType dtype, const BlockKernelArgs& args, const Device& device);
std::string describe_block_sm90(BlockForm form, DType dtype, int64_t channels, int64_t hidden);

// float32 tokens, a pair of kernels with ordinary multiply-adds, for every architecture.
void launch_block_float32(const BlockKernelArgs& args, const Device& device);
std::string describe_block_float32();

}  // namespace riformer::cuda
