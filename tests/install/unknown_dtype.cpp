// Gives every kernel, and every parameter of one, a dtype that does not exist. Prints "op field: what was thrown", one
// line for each. Built and run by test_cpu_sources.py, with kernels_scalar.cpp.
#include <cstdio>
#include <exception>

#include "../../csrc/cpu/kernels.h"

namespace {

using namespace riformer;
using namespace riformer::cpu;

constexpr DType kUnknown = static_cast<DType>(7);
constexpr int64_t kChannels = 8, kPositions = 4;

float values[4096], results[4096], moments[2 * kChannels];

void run(int64_t count, void (*task)(int64_t, int64_t, void*), void* context) { task(0, count, context); }

constexpr Parameter BlockArgs::* kBlockParameters[] = {
    &BlockArgs::layer_scale_1, &BlockArgs::norm1_weight, &BlockArgs::norm1_bias, &BlockArgs::affine_weight,
    &BlockArgs::affine_bias,   &BlockArgs::norm2_weight, &BlockArgs::norm2_bias, &BlockArgs::fc1_weight,
    &BlockArgs::fc1_bias,      &BlockArgs::fc2_weight,   &BlockArgs::fc2_bias,   &BlockArgs::layer_scale_2,
};
constexpr Parameter HeadArgs::* kHeadParameters[] = {&HeadArgs::norm_weight, &HeadArgs::norm_bias, &HeadArgs::fc_weight,
                                                     &HeadArgs::fc_bias};

template <class Args>
Args valid() {
  Args args{};
  args.x = values;
  args.batch = 1;
  args.channels = kChannels;
  args.pool = {run, 1};
  return args;
}

BlockArgs block() {
  BlockArgs args = valid<BlockArgs>();
  args.out = results;
  args.positions = kPositions;
  args.hidden = kChannels;
  args.moments = moments;
  for (const auto parameter : kBlockParameters) args.*parameter = {values, DType::f32};
  return args;
}
EmbedArgs embed() {
  EmbedArgs args = valid<EmbedArgs>();
  args.out = results;
  args.in_channels = args.height = args.width = args.kernel_height = args.kernel_width = args.stride = 1;
  args.stride_batch = args.stride_channel = args.stride_row = args.stride_column = 1;
  args.out_height = args.out_width = 1;
  args.weight = {values, DType::f32};
  return args;
}
NormArgs norm() {
  NormArgs args = valid<NormArgs>();
  args.out = results;
  args.positions = kPositions;
  args.moments = moments;
  args.weight = args.bias = {values, DType::f32};
  return args;
}
HeadArgs head() {
  HeadArgs args = valid<HeadArgs>();
  args.out = results;
  args.positions = kPositions;
  args.classes = 4;
  args.moments = moments;
  args.norm_weight = args.norm_bias = args.fc_weight = {values, DType::f32};
  return args;
}
MomentsArgs moments_args() {
  MomentsArgs args = valid<MomentsArgs>();
  args.positions = kPositions;
  args.moments_out = results;
  return args;
}

template <class Args, class Change>
void check(const char* name, int64_t (*kernel)(const Args&), Args args, Change change) {
  const char* before = kernel(args) == 0 ? "" : "not even the valid call worked; ";
  change(args);
  try {
    kernel(args);
    std::printf("%s: %snothing\n", name, before);
  } catch (const std::exception& error) {
    std::printf("%s: %s%s\n", name, before, error.what());
  }
}

}  // namespace

int main() {
  const Kernels& kernels = scalar::kKernels;
  const Parameter unknown = {values, kUnknown};
  check("moments x", kernels.moments, moments_args(), [](MomentsArgs& args) { args.dtype = kUnknown; });
  check("embed x", kernels.embed, embed(), [](EmbedArgs& args) { args.x_dtype = kUnknown; });
  check("embed out", kernels.embed, embed(), [](EmbedArgs& args) { args.dtype = kUnknown; });
  check("embed weight", kernels.embed, embed(), [&](EmbedArgs& args) { args.weight = unknown; });
  check("embed bias", kernels.embed, embed(), [&](EmbedArgs& args) { args.bias = unknown; });
  check("block x", kernels.block, block(), [](BlockArgs& args) { args.dtype = kUnknown; });
  for (const auto parameter : kBlockParameters)
    check("block parameter", kernels.block, block(), [&](BlockArgs& args) { args.*parameter = unknown; });
  check("norm x", kernels.norm, norm(), [](NormArgs& args) { args.x_dtype = kUnknown; });
  check("norm out", kernels.norm, norm(), [](NormArgs& args) { args.dtype = kUnknown; });
  check("norm weight", kernels.norm, norm(), [&](NormArgs& args) { args.weight = unknown; });
  check("norm bias", kernels.norm, norm(), [&](NormArgs& args) { args.bias = unknown; });
  check("head x", kernels.head, head(), [](HeadArgs& args) { args.x_dtype = kUnknown; });
  check("head out", kernels.head, head(), [](HeadArgs& args) { args.dtype = kUnknown; });
  for (const auto parameter : kHeadParameters)
    check("head parameter", kernels.head, head(), [&](HeadArgs& args) { args.*parameter = unknown; });
}
