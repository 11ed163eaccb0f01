// `block` on the host: which kernels run, where their intermediate results lie, and in what order they run.
#include <algorithm>
#include <sstream>

#include "block_choice.h"
#include "block_launch.h"
#include "block_maps.h"
#include "moments.h"

namespace riformer::cuda {
namespace {

// The share of rows, in per cent, that slots which end with their image may waste. Above that, slots cross images and a
// kernel of its own takes the moments. 28 x 28 positions waste 6 %. 14 x 14 positions would waste 31 %; there, counted
// in bytes, that kernel costs 5 % of the block's time at C = 320.
constexpr int64_t kMostWasted = 8;

int64_t slots_per_image_of(const BlockProblem& problem) {
  if (problem.per_position) return 0;
  const int64_t slots = slots_in_image(problem.positions);
  return (slots * kSlotRows - problem.positions) * 100 <= kMostWasted * problem.positions ? slots : 0;
}

bool fused_sm90_serves(int64_t channels, int64_t hidden) {
  for (const int64_t served : {64, 96, 128, 192, 320, 384})
    if (channels == served) return hidden % 64 == 0;
  return false;
}
bool wide_sm90_serves(int64_t channels, int64_t hidden) {
  return channels % 128 == 0 && channels <= 768 && hidden % 128 == 0;
}
bool narrow_sm90_serves(int64_t channels, int64_t hidden) {
  return channels % 64 == 0 && channels <= 768 && hidden % 64 == 0;
}

BlockProblem problem_of(const BlockArgs& args) {
  return {args.channels, args.hidden,       args.positions,           args.batch * args.positions,
          args.dtype,    args.per_position, args.device.architecture, args.device.processors};
}

// Where the intermediate results lie in the workspace, in bytes from its start.
struct Layout {
  int64_t maps, statistics, constants, partials, hidden_tensor, bytes;

  Layout(const BlockArgs& args, const BlockChoice& choice) {
    int64_t end = 0;
    const auto place = [&end](int64_t bytes) {
      const int64_t at = end;
      end += (bytes + 255) / 256 * 256;
      return at;
    };
    const int64_t rows = args.batch * args.positions;
    maps = place(4 * maps_count(args));
    statistics = place(4 * statistics_count(args));
    constants = place(4 * constants_count(args));
    const int64_t of_slots = slot_count(rows, args.positions, choice.slots_per_image) * 2 * args.channels;
    const int64_t of_pass = moments_partials_count(args.batch, args.positions, args.channels);
    partials = place(args.per_position ? 0 : 4 * (choice.slots_per_image ? of_slots : of_pass));
    hidden_tensor = place(choice.form == BlockForm::fused ? 0 : size_of(args.dtype) * rows * args.hidden);
    bytes = end;
  }
};

}  // namespace

#if defined(RIFORMER_SM90)
bool has_sm90() { return true; }
#else
// In the place of block_sm90.cu, which is not compiled for a library without 90a. choose_block never chooses its
// kernels.
bool has_sm90() { return false; }
[[noreturn]] static void fail_without_sm90() {
  throw std::runtime_error(
      "riformer: this library has no code for sm_90a; build it with RIFORMER_CUDA_ARCHITECTURES=\"80;90a\"");
}
std::string describe_block_sm90(BlockForm, DType, int64_t, int64_t) { fail_without_sm90(); }
void launch_block_sm90(BlockForm, DType, const BlockKernelArgs&, const Device&) { fail_without_sm90(); }
#endif

int expand_splits(int64_t groups, int tiles, int processors) {
  int best = 1;
  int64_t least = 0;
  for (int splits = 1; splits <= tiles; ++splits) {
    if (tiles % splits) continue;
    const int64_t waves = (groups * splits + processors - 1) / processors;
    // Loading the rows and norming them counts as one column tile.
    const int64_t time = waves * (tiles / splits + 1);
    if (splits == 1 || time < least) {
      least = time;
      best = splits;
    }
  }
  return best;
}

BlockChoice choose_block(const BlockProblem& problem) {
  const int64_t per_image = slots_per_image_of(problem);
  if (problem.dtype == DType::f32) return {BlockFamily::float32, BlockForm::pair_wide, per_image};
  with_16_bit_dtype(problem.dtype, "the block kernels for sm_80 and sm_90", [](auto) {});
  const int64_t slots = slot_count(problem.rows, problem.positions, per_image);
  if (has_sm90() && problem.architecture == 90) {
    if (fused_sm90_serves(problem.channels, problem.hidden)) {
      // A multiprocessor takes two to four slots at a time, so with few slots most multiprocessors would be idle.
      const bool few = slots * 2 <= problem.processors;
      const bool narrow = few && narrow_sm90_serves(problem.channels, problem.hidden);
      return {BlockFamily::sm90, narrow ? BlockForm::pair_narrow : BlockForm::fused, per_image};
    }
    if (wide_sm90_serves(problem.channels, problem.hidden)) {
      const bool narrow = (slots + 1) / 2 * (problem.channels / 128) * 2 <= problem.processors;
      return {BlockFamily::sm90, narrow ? BlockForm::pair_narrow : BlockForm::pair_wide, per_image};
    }
  }
  const bool fused = fused_sm80_serves(problem.channels, problem.hidden) &&
                     fused_sm80_fills(problem.channels, slots, problem.processors);
  return {BlockFamily::sm80, fused ? BlockForm::fused : BlockForm::pair_wide, per_image};
}

std::string BlockProblem::text() const {
  std::ostringstream out;
  out << channels << " channels, " << hidden << " hidden, " << positions << " positions, " << rows << " rows of "
      << with_dtype(dtype, [](auto element) { return ElementTraits<decltype(element)>::kName; }) << ", "
      << (per_position ? "LayerNorm" : "GroupNorm") << ", sm_" << architecture << " with " << processors
      << " multiprocessors";
  return out.str();
}

std::string choice_text(const BlockProblem& problem, const BlockChoice& choice) {
  std::string kernels;
  if (choice.family == BlockFamily::float32)
    kernels = describe_block_float32();
  else if (choice.family == BlockFamily::sm80)
    kernels = describe_block_sm80(choice.form, problem.channels);
  else
    kernels = describe_block_sm90(choice.form, problem.dtype, problem.channels, problem.hidden);
  if (problem.per_position) return kernels;
  return kernels + (choice.slots_per_image ? "; moments in the epilogue" : "; moments in a pass of their own");
}

std::string block_choice(const BlockArgs& args) {
  const BlockProblem problem = problem_of(args);
  return choice_text(problem, choose_block(problem));
}

int64_t block_workspace(const BlockArgs& args) { return Layout(args, choose_block(problem_of(args))).bytes; }

void block(const BlockArgs& args) {
  if (args.batch == 0 || args.positions == 0) return;
  const BlockProblem problem = problem_of(args);
  const BlockChoice choice = choose_block(problem);
  const Layout layout(args, choice);
  unsigned char* workspace = static_cast<unsigned char*>(args.workspace);
  const auto floats = [workspace](int64_t at) { return reinterpret_cast<float*>(workspace + at); };
  BlockKernelArgs kernel{};
  kernel.x = args.x;
  kernel.out = args.out;
  kernel.maps = floats(layout.maps);
  kernel.statistics = args.per_position ? floats(layout.statistics) : nullptr;
  kernel.constants = floats(layout.constants);
  kernel.fc1_weight = args.fc1_weight;
  kernel.fc2_weight = args.fc2_weight;
  kernel.partials = choice.slots_per_image ? floats(layout.partials) : nullptr;
  kernel.hidden_tensor = workspace + layout.hidden_tensor;
  kernel.rows = problem.rows;
  kernel.positions = args.positions;
  kernel.slots_per_image = choice.slots_per_image;
  kernel.channels = static_cast<int>(args.channels);
  kernel.hidden = static_cast<int>(args.hidden);
  kernel.residual = args.residual;
  try {
    launch_block_maps(args, floats(layout.maps), floats(layout.statistics), floats(layout.constants));
    if (choice.family == BlockFamily::float32)
      launch_block_float32(kernel, args.device);
    else if (choice.family == BlockFamily::sm90)
      launch_block_sm90(choice.form, args.dtype, kernel, args.device);
    else
      launch_block_sm80(choice.form, args.dtype, kernel, args.device);
    if (args.per_position) return;
    if (choice.slots_per_image)
      launch_merge(kernel.partials, args.moments_out, args.batch, args.positions, choice.slots_per_image, args.channels,
                   args.device);
    else
      launch_moments(args.out, args.dtype, args.batch, args.positions, args.channels, args.moments_out,
                     floats(layout.partials), args.device);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(error.what()) + "; in a block of " + problem.text() + ": " +
                             choice_text(problem, choice));
  }
}

}  // namespace riformer::cuda
