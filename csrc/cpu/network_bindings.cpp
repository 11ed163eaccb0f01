// The op `network`: a network that Python has described once, run on images. Not in the table of ops (common/ops.h), as
// it stands for a sequence of them.
//
// What is kept between calls are the parameters' tensors, never anything made from their values. Each call reads where
// their memory lies, their dtypes and their shapes anew, and checks them as the ops do.
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "host.h"
#include "network.h"

namespace {

using namespace riformer;
using namespace riformer::cpu;

// One part of the network with its arguments, in the order of the op's schema.
struct Part {
  enum Kind : int64_t { kEmbed, kBlock, kNorm, kHead } kind;
  std::vector<OptionalTensor> tensors;
  std::vector<int64_t> integers;
  std::vector<double> reals;
};

// How many tensors, whole numbers and real numbers a part of each kind has.
struct Counts {
  size_t tensors, integers, reals;
};
constexpr Counts kCounts[] = {{2, 2, 0}, {12, 1, 2}, {2, 1, 1}, {4, 1, 1}};

using Parts = std::vector<Part>;

std::mutex mutex;
std::map<int64_t, std::shared_ptr<const Parts>>& prepared() {
  static auto* parts = new std::map<int64_t, std::shared_ptr<const Parts>>;  // never destroyed, as tensors outlive exit
  return *parts;
}

// Takes the next `count` values of a list.
template <class T>
std::vector<T> take(const std::vector<T>& list, size_t& at, size_t count) {
  if (at + count > list.size()) fail("riformer::network_prepare: a part lacks arguments");
  std::vector<T> taken(list.begin() + static_cast<int64_t>(at), list.begin() + static_cast<int64_t>(at + count));
  at += count;
  return taken;
}

int64_t network_prepare(std::vector<int64_t> kinds, std::vector<OptionalTensor> tensors, std::vector<int64_t> integers,
                        std::vector<double> reals) {
  auto parts = std::make_shared<Parts>();
  size_t tensor = 0, integer = 0, real = 0;
  for (const int64_t kind : kinds) {
    if (kind < 0 || kind > Part::kHead) fail("riformer::network_prepare: there is no part of kind ", kind);
    const Counts counts = kCounts[kind];
    parts->push_back({static_cast<Part::Kind>(kind), take(tensors, tensor, counts.tensors),
                      take(integers, integer, counts.integers), take(reals, real, counts.reals)});
  }
  if (tensor != tensors.size() || integer != integers.size() || real != reals.size())
    fail("riformer::network_prepare: more arguments than the parts take");
  static int64_t last = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  prepared()[++last] = std::move(parts);
  return last;
}

void network_release(int64_t number) {
  std::shared_ptr<const Parts> released;  // freed after the lock, as tensors are
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = prepared().find(number);
  if (found == prepared().end()) return;
  released = std::move(found->second);
  prepared().erase(found);
}

std::shared_ptr<const Parts> parts_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = prepared().find(number);
  if (found == prepared().end()) fail("riformer::network: there is no prepared network ", number);
  return found->second;
}

// Builds the network for one call.
struct Builder {
  const Tensor& x;
  ScalarType tokens_type, features_type, scores_type;
  DType tokens;
  Network network;
  Parameters parameters;
  std::vector<Tensor> results;

  Builder(const Tensor& x_, ScalarType tokens_, ScalarType features_, ScalarType scores_)
      : x(x_),
        tokens_type(tokens_),
        features_type(features_),
        scores_type(scores_),
        tokens(dtype_of(tokens_, "the tokens")) {}

  // The segment of a part behind an embedding.
  Segment& segment() {
    if (network.segments.empty()) fail("riformer::network: its first part is no embedding");
    return network.segments.back();
  }
  template <class Args>
  void describe_tokens_of_segment(Args& args) {
    const Segment& own = segment();
    args.batch = network.batch;
    args.channels = own.embed.channels;
    args.positions = own.positions();
  }
  static const Tensor& needed(const OptionalTensor& tensor) {
    if (!tensor) fail("riformer::network: a part lacks a parameter that it cannot do without");
    return *tensor;
  }
  void* result(std::initializer_list<int64_t> shape, ScalarType type) {
    results.push_back(torch::stable::empty(shape, type, std::nullopt, x.device()));
    return results.back().mutable_data_ptr();
  }

  void embed(const Part& part) {
    EmbedArgs args{};
    if (network.segments.empty()) {
      describe_images(args, x);
      args.x = x.const_data_ptr();
      args.x_dtype = dtype_of(x.scalar_type(), "x");
      network.batch = args.batch;
    } else {
      const EmbedArgs& before = network.segments.back().embed;
      args.batch = network.batch;
      args.in_channels = before.channels;
      args.height = before.out_height;
      args.width = before.out_width;
      args.stride_column = 1;
      args.stride_row = args.width;
      args.stride_channel = args.height * args.width;
      args.stride_batch = args.in_channels * args.stride_channel;
      args.x_dtype = tokens;
    }
    args.dtype = tokens;
    describe_weights(args, parameters, needed(part.tensors[0]), part.tensors[1], part.integers[0], part.integers[1]);
    Segment next;
    next.embed = args;
    network.segments.push_back(std::move(next));
  }
  void block(const Part& part) {
    const auto& t = part.tensors;
    const bool per_position = part.integers[0] != 0;
    BlockArgs args{};
    describe_tokens_of_segment(args);
    args.dtype = tokens;
    describe_block_parameters(args, parameters, t[0], t[1], t[2], t[3], t[4], part.reals[0], needed(t[5]), needed(t[6]),
                              part.reals[1], needed(t[7]), t[8], needed(t[9]), t[10], t[11], per_position, true, false);
    segment().moments |= !per_position;
    segment().blocks.push_back(args);
  }
  void norm(const Part& part) {
    NormArgs args{};
    describe_tokens_of_segment(args);
    args.x_dtype = tokens;
    args.dtype = dtype_of(features_type, "the features");
    describe_norm(args, parameters, needed(part.tensors[0]), needed(part.tensors[1]), part.reals[0],
                  part.integers[0] != 0);
    Segment& own = segment();
    args.out = result({args.batch, args.channels, own.embed.out_height, own.embed.out_width}, features_type);
    own.moments |= !args.per_position;
    own.norm = args;
    own.normed = true;
  }
  void head(const Part& part) {
    const auto& t = part.tensors;
    HeadArgs& args = network.head;
    describe_tokens_of_segment(args);
    args.x_dtype = tokens;
    args.dtype = dtype_of(scores_type, "the scores");
    describe_head(args, parameters, needed(t[0]), needed(t[1]), part.reals[0], needed(t[2]), t[3],
                  part.integers[0] != 0);
    args.out = result({args.batch, args.classes}, scores_type);
    segment().moments |= !args.per_position;
    network.classified = true;
  }

  void add(const Part& part) {
    switch (part.kind) {
      case Part::kEmbed: return embed(part);
      case Part::kBlock: return block(part);
      case Part::kNorm: return norm(part);
      case Part::kHead: return head(part);
    }
  }
};

std::vector<Tensor> network(int64_t number, const Tensor& x, ScalarType tokens, ScalarType features,
                            ScalarType scores) {
  const std::shared_ptr<const Parts> parts = parts_of(number);
  Builder builder(x, tokens, features, scores);
  for (const Part& part : *parts) builder.add(part);
  report(run_network(chosen_kernels(), builder.network, pool()));
  return builder.results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(riformer, library) {
  library.def("network_prepare(int[] kinds, Tensor?[] tensors, int[] integers, float[] reals) -> int");
  library.def("network_release(int number) -> ()");
  library.def("network(int number, Tensor x, ScalarType tokens, ScalarType features, ScalarType scores) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(riformer, CompositeExplicitAutograd, library) {
  library.impl("network_prepare", TORCH_BOX(&network_prepare));
  library.impl("network_release", TORCH_BOX(&network_release));
}
STABLE_TORCH_LIBRARY_IMPL(riformer, CPU, library) { library.impl("network", TORCH_BOX(&network)); }
