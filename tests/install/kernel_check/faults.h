// Faults that the checks must find: kernels that get other arguments, or write what they must not.
#pragma once

#include "check_others.h"

namespace kernel_check {

// In the order of the cases below.
constexpr const char* kFaults[] = {
    "block: no bias of the first product",
    "block: no bias of the second product",
    "block: no second layer scale",
    "block: eps dropped",
    "block: the residual twice or not at all",
    "block: statistics of each position in place of the image's",
    "block: the last row of the first weight is that before it",
    "block: one element unwritten",
    "block: the element before the result written",
    "block: the last bit depends on the batch",
    "block: the last bit depends on the threads",
    "block: the moments are those of the input",
    "embed: no bias",
    "embed: the images moved by one column",
    "norm: eps dropped",
    "norm: the last bit depends on the threads",
    "head: no bias of the classifier",
    "moments: unbiased",
};
constexpr int kFaultCount = static_cast<int>(sizeof(kFaults) / sizeof(kFaults[0]));

struct FaultState {
  Kernels sound;
  int number;
};
inline FaultState& fault() {
  static FaultState state;
  return state;
}

inline int64_t faulty_block(const BlockArgs& given) {
  BlockArgs args = given;
  const auto bytes = static_cast<size_t>(args.batch * args.channels * args.positions * riformer::size_of(args.dtype));
  const auto element = static_cast<size_t>(riformer::size_of(args.dtype));
  auto* out = static_cast<unsigned char*>(args.out);
  std::vector<unsigned char> kept;
  switch (fault().number) {
    case 0: args.fc1_bias = {}; break;
    case 1: args.fc2_bias = {}; break;
    case 2: args.layer_scale_2 = {}; break;
    case 3: args.eps1 = args.eps2 = 1e-12; break;
    case 4: args.residual = !args.residual; break;
    case 5: args.per_position = true; break;
    case 6: {
      const auto row = static_cast<size_t>(args.channels * riformer::size_of(args.fc1_weight.dtype));
      const auto* weight = static_cast<const unsigned char*>(args.fc1_weight.data);
      kept.assign(weight, weight + static_cast<size_t>(args.hidden) * row);
      std::copy(kept.end() - 2 * static_cast<int64_t>(row), kept.end() - static_cast<int64_t>(row),
                kept.end() - static_cast<int64_t>(row));
      args.fc1_weight.data = kept.data();
      break;
    }
    case 7: kept.assign(out + bytes / element / 2 * element, out + bytes / element / 2 * element + element); break;
    default: break;
  }
  const int64_t missing = fault().sound.block(args);
  switch (fault().number) {
    case 7: std::copy(kept.begin(), kept.end(), out + bytes / element / 2 * element); break;
    case 8: out[-1] ^= 1; break;
    case 9: out[0] ^= args.batch > 1; break;
    case 10: out[0] ^= args.pool.threads > 1; break;
    case 11:
      if (args.moments_out)
        std::memcpy(args.moments_out, args.moments,
                    static_cast<size_t>(args.batch * 2 * args.channels) * sizeof(float));
      break;
    default: break;
  }
  return missing;
}

inline int64_t faulty_embed(const EmbedArgs& given) {
  EmbedArgs args = given;
  if (fault().number == 12) args.bias = {};
  if (fault().number == 13) {
    args.x = static_cast<const char*>(args.x) + args.stride_column * riformer::size_of(args.x_dtype);
    --args.width;
  }
  return fault().sound.embed(args);
}

inline int64_t faulty_norm(const NormArgs& given) {
  NormArgs args = given;
  if (fault().number == 14) args.eps = 0;
  const int64_t missing = fault().sound.norm(args);
  if (fault().number == 15) *static_cast<unsigned char*>(args.out) ^= args.pool.threads > 1;
  return missing;
}

inline int64_t faulty_head(const HeadArgs& given) {
  HeadArgs args = given;
  if (fault().number == 16) args.fc_bias = {};
  return fault().sound.head(args);
}

inline int64_t faulty_moments(const MomentsArgs& given) {
  const int64_t missing = fault().sound.moments(given);
  if (fault().number == 17 && given.positions > 1)
    for (int64_t i = 0; i < given.batch * given.channels; ++i) {
      float& centred = given.moments_out[i / given.channels * 2 * given.channels + given.channels + i % given.channels];
      centred *= static_cast<float>(given.positions) / static_cast<float>(given.positions - 1);
    }
  return missing;
}

// The kernels with one of the faults.
inline Kernels with_fault(const Kernels& kernels, int number) {
  fault() = {kernels, number};
  Kernels faulty{};
  faulty.block = faulty_block;
  faulty.embed = faulty_embed;
  faulty.norm = faulty_norm;
  faulty.head = faulty_head;
  faulty.moments = faulty_moments;
  return faulty;
}

}  // namespace kernel_check
