// The block's kernels for Hopper (sm_90a), and how they are started. Code for sm_90a runs on no other GPU.
#include <algorithm>

#include "block_choice.h"
#include "block_fused_sm90.h"
#include "block_launch.h"
#include "block_pair_sm90.h"
#include "tensor_map.h"

namespace riformer::cuda {
namespace {

// The count fits 32 bits, because tensor_map has checked that the number of rows does.
int slot_count_of(const BlockKernelArgs& block) {
  return static_cast<int>(slot_count(block.rows, block.positions, block.slots_per_image));
}

template <class T, int C>
void launch_fused(const BlockKernelArgs& block, const Device& device) {
  using Config = FusedConfig<T, C>;
  FusedArgs args{};
  args.block = block;
  args.x = tensor_map<T>(block.x, block.rows, C, kSlotRows, Config::kStrip);
  args.fc1 = tensor_map<T>(block.fc1_weight, block.hidden, C, Config::kChunk / Config::kCluster, Config::kStrip);
  args.fc2 = tensor_map<T>(block.fc2_weight, C, block.hidden, C / Config::kCluster, Config::kChunk);
  args.slots = slot_count_of(block);
  args.stages = Config::stages(block.hidden);
  args.resident = Config::resident(block.hidden);
  const int64_t per_cluster = Config::kConsumers * Config::kCluster;
  const int64_t clusters = std::min<int64_t>((args.slots + per_cluster - 1) / per_cluster,
                                             std::max(device.processors / Config::kCluster, 1));
  launch(fused_sm90<T, C>,
         {"fused_sm90", clusters * Config::kCluster, Config::kThreads, Config::shared_bytes(block.hidden),
          Config::kCluster, device.stream},
         args);
}

template <class T, int Consumers, int Width>
void launch_expand(const BlockKernelArgs& block, const Device& device) {
  using Config = ExpandConfig<T, Consumers, Width>;
  PairArgs args{};
  args.block = block;
  args.tokens = tensor_map<T>(block.x, block.rows, block.channels, kSlotRows, kPanelDepth<T>);
  args.weight = tensor_map<T>(block.fc1_weight, block.hidden, block.channels, Width, kPanelDepth<T>);
  args.slots = slot_count_of(block);
  const int64_t groups = (args.slots + Consumers - 1) / Consumers;
  const int tiles = block.hidden / Width, splits = expand_splits(groups, tiles, device.processors);
  args.column_tiles = tiles / splits;
  args.stages = ring_stages(Config::fixed_bytes(block.channels), Config::kPanelBytes);
  launch(
      expand_sm90<T, Consumers, Width>,
      {"expand_sm90", groups * splits, Config::kThreads,
       Config::fixed_bytes(block.channels) + static_cast<int64_t>(args.stages) * Config::kPanelBytes, 1, device.stream},
      args);
}

template <class T, int Consumers, int Width>
void launch_project(const BlockKernelArgs& block, const Device& device) {
  using Config = ProjectConfig<T, Consumers, Width>;
  PairArgs args{};
  args.block = block;
  args.tokens = tensor_map<T>(block.x, block.rows, block.channels, kSlotRows, Config::kStrip);
  args.hidden_tensor = tensor_map<T>(block.hidden_tensor, block.rows, block.hidden, kSlotRows, kPanelDepth<T>);
  args.weight = tensor_map<T>(block.fc2_weight, block.channels, block.hidden, Width, kPanelDepth<T>);
  args.slots = slot_count_of(block);
  args.column_tiles = 1;
  args.stages = ring_stages(Config::kFixedBytes, Config::kPanelBytes);
  const int64_t groups = (args.slots + Consumers - 1) / Consumers;
  launch(project_sm90<T, Consumers, Width>,
         {"project_sm90", groups * (block.channels / Width), Config::kThreads,
          Config::kFixedBytes + static_cast<int64_t>(args.stages) * Config::kPanelBytes, 1, device.stream},
         args);
}

template <class T>
void launch_block(BlockForm form, const BlockKernelArgs& block, const Device& device) {
  if (form == BlockForm::pair_wide) {
    launch_expand<T, 2, 128>(block, device);
    launch_project<T, 2, 128>(block, device);
  } else if (form == BlockForm::pair_narrow) {
    launch_expand<T, 1, 64>(block, device);
    launch_project<T, 1, 32>(block, device);
  } else {
    switch (block.channels) {
      case 64: return launch_fused<T, 64>(block, device);
      case 96: return launch_fused<T, 96>(block, device);
      case 128: return launch_fused<T, 128>(block, device);
      case 192: return launch_fused<T, 192>(block, device);
      case 320: return launch_fused<T, 320>(block, device);
      case 384: return launch_fused<T, 384>(block, device);
      default:
        throw std::runtime_error("riformer: no fused sm_90 kernel for " + std::to_string(block.channels) + " channels");
    }
  }
}

template <class T, int C>
std::string describe_fused(int64_t hidden) {
  using Config = FusedConfig<T, C>;
  return "fused_sm90: " + std::to_string(Config::kConsumers) + " warpgroups of 64 rows, " +
         std::to_string(Config::kChunk) + " hidden channels at a time, " + std::to_string(Config::stages(hidden)) +
         " panels " + (Config::resident(hidden) ? "that stay" : "in a ring") + ", clusters of " +
         std::to_string(Config::kCluster) + ", " + std::to_string(Config::shared_bytes(hidden)) +
         " bytes of shared memory";
}

template <class T>
std::string describe_block(BlockForm form, int64_t channels, int64_t hidden) {
  if (form == BlockForm::pair_wide) return "expand_sm90 and project_sm90: 2 warpgroups of 64 rows x 128 columns";
  if (form == BlockForm::pair_narrow)
    return "expand_sm90 (64 rows x 64 columns) and project_sm90 (64 rows x 32 columns)";
  switch (channels) {
    case 64: return describe_fused<T, 64>(hidden);
    case 96: return describe_fused<T, 96>(hidden);
    case 128: return describe_fused<T, 128>(hidden);
    case 192: return describe_fused<T, 192>(hidden);
    case 320: return describe_fused<T, 320>(hidden);
    default: return describe_fused<T, 384>(hidden);
  }
}

constexpr const char* kKernels = "the block kernels for sm_90";

}  // namespace

std::string describe_block_sm90(BlockForm form, DType dtype, int64_t channels, int64_t hidden) {
  std::string text;
  with_16_bit_dtype(dtype, kKernels,
                    [&](auto element) { text = describe_block<decltype(element)>(form, channels, hidden); });
  return text;
}

void launch_block_sm90(BlockForm form, DType dtype, const BlockKernelArgs& block, const Device& device) {
  with_16_bit_dtype(dtype, kKernels, [&](auto element) { launch_block<decltype(element)>(form, block, device); });
}

}  // namespace riformer::cuda
