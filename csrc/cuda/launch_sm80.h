// Starts the block kernels of sm_80 (and of everything that runs its code), and says which they would be. The kernels
// are compiled in block_sm80.cu; whoever chooses among them needs this header alone.
#pragma once

#include <string>

#include "block_args.h"

namespace riformer::cuda {

// For all of them: x, out, the weights, maps, statistics and constants are 16-byte aligned; slots that cross images
// (0 slots per image) are for images of less than 2^31 positions.

// Whether launch_fused_sm80 takes these widths; it is for 16-bit tokens.
bool fused_serves(int64_t channels, int64_t hidden);

// Whether the fused kernel keeps at least half of the multiprocessors at work on so many slots. With fewer the two
// kernels spread the same work over more of them; the bits are the same, so this may follow the batch. An estimate.
bool fused_fills(int64_t channels, int64_t slots, int processors);

// The whole block in one kernel; `between` is not used. T is bf16 or f16.
template <class T>
void launch_fused_sm80(const BlockKernelArgs& args, const Device& device);
std::string describe_fused_sm80(int64_t channels);

// The same bits from two kernels with the hidden tensor in `between`, for any widths (multiples of 8). The tile
// follows the size of the launch: no result depends on it.
template <class T>
void launch_two_kernels_sm80(const BlockKernelArgs& args, const Device& device);
std::string describe_two_kernels_sm80(int64_t channels);

// float32 tokens and products on the ordinary units, two kernels with the hidden tensor in `between`.
void launch_block_float32(const BlockKernelArgs& args, const Device& device);
std::string describe_block_float32();

}  // namespace riformer::cuda
