// The block kernels for sm_80 and what follows it, all dtypes. Compiled by nvcc, and as C++ for the emulator.
#include "block_float32.h"
#include "block_fused_sm80.h"
#include "block_launch.h"
#include "block_pair_sm80.h"

namespace riformer::cuda {

bool fused_sm80_serves(int64_t channels, int64_t hidden) {
  bool divides = false;
  sm80::with_fused_shape(channels, [&](auto shape) { divides = hidden > 0 && hidden % decltype(shape)::kHidden == 0; });
  return divides;
}

bool fused_sm80_fills(int64_t channels, int64_t slots, int processors) {
  int64_t thread_blocks = 0;
  sm80::with_fused_shape(channels,
                         [&](auto shape) { thread_blocks = sm80::fused_thread_blocks<decltype(shape)>(slots); });
  return 2 * thread_blocks >= processors;
}

std::string describe_block_sm80(BlockForm form, int64_t channels) {
  return form == BlockForm::fused ? sm80::describe_fused(channels) : sm80::describe_pair(channels);
}

void launch_block_sm80(BlockForm form, DType dtype, const BlockKernelArgs& args, const Device& device) {
  with_16_bit_dtype(dtype, "the block kernels for sm_80", [&](auto element) {
    using T = decltype(element);
    if (form == BlockForm::fused)
      sm80::launch_fused<T>(args, device);
    else
      sm80::launch_pair<T>(args, device);
  });
}

void launch_block_float32(const BlockKernelArgs& args, const Device& device) {
  const int64_t slots = slot_count(args.rows, args.positions, args.slots_per_image);
  const auto across = [](int64_t columns) { return (columns + float32::kColumns - 1) / float32::kColumns; };
  Launch how{"riformer block float32 expand", slots * across(args.hidden), float32::kThreads, float32::kSharedBytes};
  how.stream = device.stream;
  launch(args.statistics ? float32::expand_kernel<true> : float32::expand_kernel<false>, how, args);
  how.kernel = "riformer block float32 project";
  how.thread_blocks = slots * across(args.channels);
  launch(float32::project_kernel, how, args);
}

std::string describe_block_float32() { return "float32 expand and project, 64 x 64"; }

}  // namespace riformer::cuda
