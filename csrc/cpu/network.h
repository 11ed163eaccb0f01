// A whole network in one call. It computes what the ops do one after the other, to the bit, and takes less time:
//   - Images go through the network in small groups, whose tokens stay in the caches of a core from part to part.
//   - With images enough for all threads, each thread takes images of its own through the whole network, and no thread
//     waits for another before the end. Otherwise all threads work on each part together.
// Nothing here knows about torch.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace riformer::cpu {

// An embedding, the blocks behind it and, where its tokens are features to be returned, their norm. The arguments
// describe all images; run_network fills in the tokens, the moments and the numbers of images of each call.
struct Segment {
  EmbedArgs embed{};
  bool moments = false;  // whether the embedding has to take those of its tokens
  std::vector<BlockArgs> blocks;
  bool normed = false;
  NormArgs norm{};  // `out` is the features of all images

  int64_t positions() const { return embed.out_height * embed.out_width; }
  int64_t token_values() const { return embed.channels * positions(); }  // of one image
};

struct Network {
  int64_t batch = 0;
  std::vector<Segment> segments;
  bool classified = false;
  HeadArgs head{};  // `out` is the scores of all images
};

// Runs the network on `pool`. Returns the bytes of memory that could not be had, 0 on success.
int64_t run_network(const Kernels& kernels, const Network& network, const Pool& pool);

// Whether each thread should take images of its own. The threads then differ by at most one image.
bool shares_images(int64_t batch, int64_t threads);

}  // namespace riformer::cpu
