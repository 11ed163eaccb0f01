// The block kernels for sm_80 and what follows it, all dtypes. Compiled by nvcc, and as C++ for the emulator.
#include "block_float32.h"
#include "block_sm80.h"
#include "product_sm80.h"

namespace riformer::cuda {

template void launch_fused_sm80<bf16>(const BlockKernelArgs& args, const Device& device);
template void launch_fused_sm80<f16>(const BlockKernelArgs& args, const Device& device);
template void launch_two_kernels_sm80<bf16>(const BlockKernelArgs& args, const Device& device);
template void launch_two_kernels_sm80<f16>(const BlockKernelArgs& args, const Device& device);

bool fused_serves(int64_t channels, int64_t hidden) {
  bool divides = false;
  sm80::with_fused_shape(channels, [&](auto shape) { divides = hidden > 0 && hidden % decltype(shape)::kHidden == 0; });
  return divides;
}

bool fused_fills(int64_t channels, int64_t slots, int processors) {
  int64_t blocks = 0;
  sm80::with_fused_shape(channels, [&](auto shape) { blocks = sm80::fused_blocks<decltype(shape)>(slots); });
  return 2 * blocks >= processors;
}

std::string describe_fused_sm80(int64_t channels) {
  std::ostringstream out;
  if (!sm80::with_fused_shape(channels, [&](auto shape) {
        using Shape = decltype(shape);
        out << "sm80 fused, " << Shape::kRows << " rows x " << Shape::kChannels << " channels, " << Shape::kHidden
            << " hidden at a time, " << Shape::kWarps << " warps, " << Shape::kStages << " stages";
      }))
    out << "sm80 fused, no kernel for " << channels << " channels";
  return out.str();
}

std::string describe_two_kernels_sm80(int64_t channels) {
  using namespace sm80;
  const std::string small = " (" + describe_product<SmallTile>() + " where that leaves multiprocessors idle)";
  return "sm80 expand, " + describe_product<LargeTile>() + small + ", and project, " +
         (wide_serves(channels) ? describe_product<WideTile>() : describe_product<LargeTile>()) + small;
}

void launch_block_float32(const BlockKernelArgs& args, const Device& device) {
  const int64_t slots = slot_count(args.rows, args.positions, args.slots_per_image);
  const auto across = [](int64_t columns) { return (columns + float32::kColumns - 1) / float32::kColumns; };
  Launch how{"riformer block float32 expand", slots * across(args.hidden), float32::kThreads, float32::kSharedBytes};
  how.stream = device.stream;
  launch(args.statistics ? float32::expand_kernel<true> : float32::expand_kernel<false>, how, args);
  how.kernel = "riformer block float32 project";
  how.blocks = slots * across(args.channels);
  launch(float32::project_kernel, how, args);
}

std::string describe_block_float32() { return "float32 expand and project, 64 x 64"; }

}  // namespace riformer::cuda
