// The kernels' plain arithmetic, over everything it can be asked: `gelu` writes GELU's float32 values for every 16-bit
// pattern (bfloat16, then float16) and for the float32 values given on the standard input; `slots` checks how rows are
// divided and which thread blocks take them; `dtypes` checks that every launcher refuses a dtype that it does not know.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../../../csrc/cuda/block_choice.h"
#include "../../../csrc/cuda/block_fused_sm90.h"
#include "../../../csrc/cuda/block_maps.h"
#include "../../../csrc/cuda/convert.h"
#include "../../../csrc/cuda/embed.h"
#include "../../../csrc/cuda/gelu.h"
#include "../../../csrc/cuda/head.h"
#include "../../../csrc/cuda/moments.h"
#include "../../../csrc/cuda/norm.h"
#include "../../../csrc/cuda/slot_sm90.h"

namespace rf = riformer::cuda;

template <class T>
static void all_patterns() {
  std::vector<float> out(65536);
  for (uint32_t bits = 0; bits < 65536; ++bits) out[bits] = rf::gelu<T>(rf::unpack_one<T>(bits));
  std::fwrite(out.data(), 4, out.size(), stdout);
}

static int failures = 0;
static void expect(bool holds, const char* what, long long a, long long b, long long c) {
  if (!holds && failures++ < 20) std::printf("%s: %lld, %lld, %lld\n", what, a, b, c);
}

// Every row in one slot, in order; none across two images where slots belong to images.
static void check_slots(int64_t images, int64_t positions, bool per_image) {
  const int64_t rows = images * positions, per = per_image ? (positions + 63) / 64 : 0;
  const int64_t count = rf::slot_count(rows, positions, per);
  rf::BlockKernelArgs args{};
  args.rows = rows;
  args.positions = positions;
  args.slots_per_image = per;
  int64_t next = 0;
  for (int64_t index = 0; index < count; ++index) {
    const rf::Slot slot = rf::slot_at(index, rows, positions, per);
    expect(slot.first == next && slot.rows >= 1 && slot.rows <= 64, "a slot", images, positions, index);
    if (per)
      expect(slot.first / positions == (slot.first + slot.rows - 1) / positions, "a slot of two images", images,
             positions, index);
    next = slot.first + slot.rows;
    const rf::Slot short_form = rf::slot_at_32(args, static_cast<int>(count), static_cast<int>(index));
    expect(short_form.first == slot.first && short_form.rows == slot.rows, "slot_at_32", images, positions, index);
    expect(rf::image_of(args, slot.first) == slot.first / positions, "image_of", images, positions, index);
  }
  expect(next == rows, "rows left over", images, positions, next);
  expect(rf::slot_at_32(args, static_cast<int>(count), static_cast<int>(count)).rows == 0, "a slot behind the last",
         images, positions, count);
}

// Every 16 bytes of a tile have a place of their own, and eight rows below each other lie in different banks.
template <int Strip>
static void check_tile(int channels) {
  using Tile = rf::SlotTile<riformer::bf16, Strip>;
  std::vector<char> taken(static_cast<size_t>(128 * channels), 0);
  for (int row = 0; row < 64; ++row)
    for (int c = 0; c < channels; c += 8) {
      const int at = Tile::at(row, c);
      const bool fits = at >= 0 && at % 16 == 0 && at + 16 <= 128 * channels && !taken[static_cast<size_t>(at)];
      expect(fits, "a place in a tile", channels, row, c);
      if (fits) taken[static_cast<size_t>(at)] = 1;
      const int in_strip = c % Strip * 2 + row * 2 * Strip;
      expect(at == c / Strip * Tile::kStripBytes + rf::swizzled<2 * Strip>(in_strip), "the two ways to swizzle",
             channels, row, c);
    }
  for (int row = 0; row < 64; row += 8)
    for (int c = 0; c < channels; c += 8) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1u << Tile::at(row + i, c) % 128 / 16;
      expect(banks == 0xff, "a bank conflict", channels, row, c);
    }
}

// The threads that norm a tile take each of its pieces once.
static void check_norm_shares(int columns) {
  std::vector<int> taken(static_cast<size_t>(64 * columns / 8), 0);
  for (int t = 0; t < 128; ++t) {
    const rf::NormShare mine = rf::norm_share(columns, t);
    for (int row = mine.row; row < 64; row += mine.step) ++taken[static_cast<size_t>(row * columns / 8 + mine.piece)];
  }
  for (const int times : taken) expect(times == 1, "a piece of a row", columns, times, 0);
}

// The turns of a fused kernel's thread blocks take every slot once, and those of a cluster are equally many.
template <int C>
static void check_turns() {
  using Config = rf::FusedConfig<riformer::bf16, C>;
  for (int processors : {1, 2, 3, 132})
    for (int slots = 1; slots < 1200; slots += slots < 40 ? 1 : 37) {
      const int turns = (slots + Config::kSlotsPerTurn - 1) / Config::kSlotsPerTurn;
      const int clusters = std::min(turns, std::max(processors / Config::kCluster, 1));
      std::vector<int> taken(static_cast<size_t>(turns * Config::kSlotsPerTurn), 0);
      for (int cluster = 0; cluster < clusters; ++cluster)
        for (int turn = cluster; turn * Config::kSlotsPerTurn < slots; turn += clusters)
          for (int rank = 0; rank < Config::kCluster; ++rank)
            for (int group = 0; group < Config::kConsumers; ++group)
              ++taken[static_cast<size_t>((turn * Config::kCluster + rank) * Config::kConsumers + group)];
      for (int slot = 0; slot < slots; ++slot)
        expect(taken[static_cast<size_t>(slot)] == 1, "a slot's turn", C, slots, slot);
    }
  for (const int64_t hidden : {64, 128, 4 * C, 8 * C}) {
    if (hidden % Config::kChunk) continue;
    expect(Config::shared_bytes(hidden) <= rf::kSharedLimit && Config::stages(hidden) >= 2, "shared memory", C, hidden,
           Config::shared_bytes(hidden));
    expect(8 * (2 * Config::stages(hidden) + 2 * rf::kMostConsumers) <= rf::kBarrierBytes, "barriers", C, hidden,
           Config::stages(hidden));
  }
  // What the warpgroups take is no more than what the launch has.
  const int at_launch = 65536 / Config::kThreads / 8 * 8;
  expect(128 * (Config::kConsumers * Config::kConsumerRegisters + Config::kProducerRegisters) <=
             at_launch * Config::kThreads,
         "registers", C, at_launch, Config::kThreads);
}

constexpr auto kUnknown = static_cast<riformer::DType>(7);

// `call` fails, and the text of its error has `expected` in it.
template <class Call>
static void expect_error(const char* what, const char* expected, const Call& call) {
  try {
    call();
  } catch (const std::logic_error& error) {
    if (std::strstr(error.what(), expected)) return;
    std::printf("%s\n", error.what());
  }
  expect(false, what, 0, 0, 0);
}

// A launcher that is given `Args` of zeros but for one dtype, which is unknown.
template <class Args, class Launch, class Field>
static void expect_refused(const char* what, const Launch& launch, const Field& field) {
  Args args{};
  args.positions = 1;
  field(args) = kUnknown;
  expect_error(what, "dtype 7 has no element type", [&] { launch(args); });
}

static void check_norm_dtypes() {
  const auto refused = [](const char* what, auto field) { expect_refused<rf::NormArgs>(what, rf::launch_norm, field); };
  refused("norm: x", [](rf::NormArgs& args) -> auto& { return args.dtype; });
  refused("norm: weight", [](rf::NormArgs& args) -> auto& { return args.weight.dtype; });
  refused("norm: bias", [](rf::NormArgs& args) -> auto& { return args.bias.dtype; });
  refused("norm: out", [](rf::NormArgs& args) -> auto& { return args.out_dtype; });
}

static void check_head_dtypes() {
  const auto launch = [](rf::HeadArgs& args) {
    args.per_position = true;
    rf::launch_head(args);
  };
  const auto refused = [&](const char* what, auto field) { expect_refused<rf::HeadArgs>(what, launch, field); };
  refused("head: x", [](rf::HeadArgs& args) -> auto& { return args.dtype; });
  refused("head: norm_weight", [](rf::HeadArgs& args) -> auto& { return args.norm_weight.dtype; });
  refused("head: norm_bias", [](rf::HeadArgs& args) -> auto& { return args.norm_bias.dtype; });
  refused("head: fc_weight", [](rf::HeadArgs& args) -> auto& { return args.fc_weight.dtype; });
  refused("head: fc_bias", [](rf::HeadArgs& args) -> auto& { return args.fc_bias.dtype; });
  refused("head: out", [](rf::HeadArgs& args) -> auto& { return args.out_dtype; });
}

static void check_embed_dtypes() {
  const auto launch = [](rf::EmbedArgs args) { rf::launch_embed(args); };
  rf::EmbedArgs args{};
  args.dtype = kUnknown;
  expect_error("embed: out", "dtype 7 has no element type", [&] { launch(args); });
  args = {};
  args.x_dtype = kUnknown;
  expect_error("embed: x", "dtype 7 has no element type", [&] { launch(args); });
  args = {};
  args.bias.dtype = kUnknown;
  expect_error("embed: bias", "dtype 7 has no element type", [&] { launch(args); });
}

static void check_block_dtypes() {
  const auto launch = [](rf::BlockArgs& args) {
    args.per_position = true;
    rf::launch_block_maps(args, nullptr, nullptr, nullptr);
  };
  constexpr rf::Parameter rf::BlockArgs::* kParameters[] = {
      &rf::BlockArgs::layer_scale_1, &rf::BlockArgs::norm1_weight, &rf::BlockArgs::norm1_bias,
      &rf::BlockArgs::affine_weight, &rf::BlockArgs::affine_bias,  &rf::BlockArgs::norm2_weight,
      &rf::BlockArgs::norm2_bias,    &rf::BlockArgs::fc1_bias,     &rf::BlockArgs::fc2_bias,
      &rf::BlockArgs::layer_scale_2};
  for (const auto parameter : kParameters)
    expect_refused<rf::BlockArgs>("block: a parameter", launch,
                                  [=](rf::BlockArgs& args) -> auto& { return (args.*parameter).dtype; });
}

static void check_dtypes() {
  expect_refused<rf::MomentsArgs>(
      "moments",
      [](const rf::MomentsArgs& args) { rf::launch_moments(nullptr, args.dtype, 0, 1, 8, nullptr, nullptr, {}); },
      [](rf::MomentsArgs& args) -> auto& { return args.dtype; });
  check_norm_dtypes();
  check_head_dtypes();
  check_embed_dtypes();
  check_block_dtypes();
  const auto f32 = riformer::DType::f32;
  expect_error("convert: from", "dtype 7", [&] { rf::launch_convert({}, nullptr, kUnknown, nullptr, f32, 0); });
  expect_error("convert: to", "dtype 7", [&] { rf::launch_convert({}, nullptr, f32, nullptr, kUnknown, 0); });
  expect_error("16-bit kernels", "such kernels compute with 16-bit elements, not with float32",
               [&] { rf::with_16_bit_dtype(f32, "such kernels", [](auto) {}); });
  expect_error("a parameter in a kernel", "dtype 7", [] { rf::load_parameter({nullptr, kUnknown}, 0); });
  expect_error("16-bit kernels", "dtype 7", [&] { rf::with_16_bit_dtype(kUnknown, "such kernels", [](auto) {}); });
}

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "dtypes") == 0) {
    check_dtypes();
    std::printf("%d failures\n", failures);
    return failures != 0;
  }
  if (count == 2 && std::strcmp(arguments[1], "gelu") == 0) {
    all_patterns<riformer::bf16>();
    all_patterns<riformer::f16>();
    for (float x; std::fread(&x, 4, 1, stdin) == 1;) {
      const float y = rf::gelu<float>(x);
      std::fwrite(&y, 4, 1, stdout);
    }
    return 0;
  }
  for (int64_t images : {1, 2, 3, 7})
    for (int64_t positions = 1; positions <= 300; ++positions)
      for (const bool per_image : {false, true}) check_slots(images, positions, per_image);
  for (int channels = 64; channels <= 768; channels += 64) check_tile<64>(channels);
  for (int channels = 32; channels <= 768; channels += 32) check_tile<32>(channels);
  for (int columns = 8; columns <= 1024; columns += 8) check_norm_shares(columns);
  check_turns<64>(), check_turns<96>(), check_turns<128>(), check_turns<192>(), check_turns<320>(), check_turns<384>();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
