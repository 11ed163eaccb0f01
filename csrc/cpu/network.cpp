// The order in which the images of a batch pass through the parts of a network.
#include "network.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>

namespace riformer::cpu {
namespace {

// How many tokens a segment should be given at once for each thread that works on it: one full task of a block
// (kMostTaskTokens in gemm.h).
constexpr int64_t kTokensPerThread = 384;

int64_t round_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The pool of a thread that works alone.
Pool alone() {
  return {[](int64_t count, void (*task)(int64_t, int64_t, void*), void* context) {
            if (count > 0) task(0, count, context);
          },
          1};
}

// The tokens and moments of a group. As much as images of usual sizes need is kept for the thread's next call, since
// memory that is new to the process is slow to write to: the operating system clears it page by page.
struct Memory {
  static constexpr int64_t kMostKept = 16 << 20;
  void* data;
  bool owned;

  explicit Memory(int64_t bytes)
      : data(bytes <= kMostKept ? thread_scratch(bytes, 2) : std::aligned_alloc(64, static_cast<size_t>(bytes))),
        owned(bytes > kMostKept) {}
  ~Memory() {
    if (owned) std::free(data);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

// Takes the images [first, first + count) through the network. The last segment gets its images in passes, and asks the
// segment before it for the tokens of one pass at a time, and so on. So the tokens of a segment are read soon after
// they were written, and memory is held for one pass only.
struct Group {
  const Kernels& kernels;
  const Network& network;
  Pool pool;
  int64_t first, count;
  struct Level {
    int64_t pass;  // images at once
    char* tokens;
    float* moments;  // [images][2][channels]
  };
  std::vector<Level> levels;

  Group(const Kernels& kernels_, const Network& network_, const Pool& pool_, int64_t first_, int64_t count_)
      : kernels(kernels_), network(network_), pool(pool_), first(first_), count(count_) {
    for (const Segment& segment : network.segments) {
      const int64_t positions = segment.positions();
      const int64_t wanted = (kTokensPerThread * pool.threads + positions - 1) / positions;
      levels.push_back({std::min(wanted, count), nullptr, nullptr});
    }
  }

  // Hands out parts of `base`, or with a null base only counts. Returns the bytes.
  int64_t lay_out(char* base) {
    int64_t used = 0;
    for (size_t i = 0; i < levels.size(); ++i) {
      const Segment& segment = network.segments[i];
      const int64_t images = i + 1 < levels.size() ? levels[i + 1].pass : count;  // that are held
      const int64_t width = static_cast<int64_t>(size_of(segment.embed.dtype));
      levels[i].tokens = base + used;
      used += round_to_line(images * segment.token_values() * width);
      levels[i].moments = reinterpret_cast<float*>(base + used);
      used += round_to_line(images * 2 * segment.embed.channels * static_cast<int64_t>(sizeof(float)));
    }
    return used;
  }

  // Runs segment i on one pass of images: `source` is the first one's images or tokens, `slot` its place among the
  // tokens that this segment holds, `image` its number in the batch.
  int64_t run_pass(size_t i, const char* source, int64_t slot, int64_t image, int64_t images) const {
    const Segment& segment = network.segments[i];
    const int64_t width = static_cast<int64_t>(size_of(segment.embed.dtype));
    char* tokens = levels[i].tokens + slot * segment.token_values() * width;
    float* moments = levels[i].moments + slot * 2 * segment.embed.channels;
    EmbedArgs embed = segment.embed;
    embed.x = source;
    embed.batch = images;
    embed.out = tokens;
    embed.moments_out = segment.moments ? moments : nullptr;
    embed.pool = pool;
    int64_t missing = kernels.embed(embed);
    for (size_t b = 0; b < segment.blocks.size() && missing == 0; ++b) {
      BlockArgs block = segment.blocks[b];
      block.x = block.out = tokens;
      block.batch = images;
      block.moments = block.moments_out = block.per_position ? nullptr : moments;
      block.pool = pool;
      missing = kernels.block(block);
    }
    if (segment.normed && missing == 0) {
      NormArgs norm = segment.norm;
      norm.x = tokens;
      norm.batch = images;
      norm.moments = norm.per_position ? nullptr : moments;
      norm.out =
          static_cast<char*>(norm.out) + image * segment.token_values() * static_cast<int64_t>(size_of(norm.dtype));
      norm.pool = pool;
      missing = kernels.norm(norm);
    }
    return missing;
  }

  // Fills the tokens of segment i with those of `images` images from number `image` on.
  int64_t run_segment(size_t i, int64_t image, int64_t images) const {
    for (int64_t done = 0; done < images; done += levels[i].pass) {
      const int64_t now = std::min(levels[i].pass, images - done);
      const char* source;
      if (i == 0) {
        const EmbedArgs& stem = network.segments[0].embed;
        source = static_cast<const char*>(stem.x) +
                 (image + done) * stem.stride_batch * static_cast<int64_t>(size_of(stem.x_dtype));
      } else {
        if (const int64_t missing = run_segment(i - 1, image + done, now)) return missing;
        source = levels[i - 1].tokens;
      }
      if (const int64_t missing = run_pass(i, source, done, image + done, now)) return missing;
    }
    return 0;
  }

  int64_t run() {
    const int64_t bytes = lay_out(nullptr);
    const Memory memory(bytes);
    if (!memory.data) return bytes;
    lay_out(static_cast<char*>(memory.data));
    const size_t last = levels.size() - 1;
    if (const int64_t missing = run_segment(last, first, count)) return missing;
    if (!network.classified) return 0;
    HeadArgs head = network.head;
    head.x = levels[last].tokens;
    head.batch = count;
    head.moments = head.per_position ? nullptr : levels[last].moments;
    head.out = static_cast<char*>(head.out) + first * head.classes * static_cast<int64_t>(size_of(head.dtype));
    head.pool = pool;
    return kernels.head(head);
  }
};

// Images that a thread takes through the whole network at once. More are not faster, and take more memory.
constexpr int64_t kMostImages = 8;

// Takes the images [first, last) through the network, in groups of nearly equal size.
int64_t run_groups(const Kernels& kernels, const Network& network, const Pool& pool, int64_t first, int64_t last) {
  const int64_t most = kMostImages * pool.threads;
  while (first < last) {
    const int64_t groups = (last - first + most - 1) / most;
    const int64_t count = (last - first + groups - 1) / groups;
    if (const int64_t missing = Group(kernels, network, pool, first, count).run()) return missing;
    first += count;
  }
  return 0;
}

// One share of the images for each thread.
struct Shares {
  const Kernels& kernels;
  const Network& network;
  int64_t threads;
  std::atomic<int64_t> missing{0};

  static void run(int64_t begin, int64_t end, void* context) {
    auto& self = *static_cast<Shares*>(context);
    const int64_t batch = self.network.batch;
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = share * batch / self.threads, last = (share + 1) * batch / self.threads;
      if (const int64_t missing = run_groups(self.kernels, self.network, alone(), first, last))
        self.missing.store(missing);
    }
  }
};

}  // namespace

bool shares_images(int64_t batch, int64_t threads) {
  const int64_t most = (batch + threads - 1) / threads;
  return threads > 1 && batch >= threads && 100 * most * threads <= 106 * batch;
}

int64_t run_network(const Kernels& kernels, const Network& network, const Pool& pool) {
  if (!shares_images(network.batch, pool.threads)) return run_groups(kernels, network, pool, 0, network.batch);
  Shares shares{kernels, network, pool.threads};
  pool.run(pool.threads, &Shares::run, &shares);
  return shares.missing.load();
}

}  // namespace riformer::cpu
