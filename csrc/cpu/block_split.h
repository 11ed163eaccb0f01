// A block whose threads share the channels and not the tokens. It serves few tokens, where otherwise each thread would
// read all weights. There are three steps, and all threads finish one before the next begins: the norm, W1 with the
// hidden channels shared out, W2 with the channels shared out. Sums are taken in the same order as in block.h, so the
// results are the same to the bit.
#pragma once

#include "block.h"

namespace riformer::RIFORMER_ISA {

template <class T, class Gemm>
struct SplitBlock {
  using Kernel = BlockKernel<T, Gemm>;
  using Memory = typename Kernel::Memory;
  using Element = typename Gemm::Element;

  Kernel& kernel;
  Memory shared{};  // z, rests, hidden and spans of the whole batch
  Panels cut;
  int spans = 0;

  explicit SplitBlock(Kernel& kernel_)
      : kernel(kernel_), cut(panels_of<Gemm>(kernel_.tasks.tiles, 0, kernel_.tasks.tiles.count())) {}

  int64_t chunks() const { return (kernel.args.hidden + kernel.choice.hidden_chunk - 1) / kernel.choice.hidden_chunk; }

  // Memory that all threads use.
  Memory shared_memory(void* base) const {
    Arena arena{static_cast<char*>(base)};
    Memory m{};
    m.z = arena.take<Element>(kernel.panels * kernel.depth1 * Gemm::kTokens);
    m.rests = arena.take<Element>(kernel.rest_elements());
    m.hidden = arena.take<Element>(chunks() * kernel.panels * kernel.depth2 * Gemm::kTokens);
    m.spans = arena.take<Span>(max_spans(kernel.tasks, Gemm::kTokens));
    m.bytes = arena.used;
    return m;
  }
  // The shared memory and the calling thread's own; false when there was none.
  bool thread_memory(Memory* m) const {
    *m = shared;
    Arena sizes{nullptr};
    const auto take = [&](Arena& arena) {
      m->sums = arena.take<float>(kernel.panels * kernel.rows2 * Gemm::kTokens);
      m->rows = arena.take<float>(Kernel::row_floats());
    };
    take(sizes);
    void* base = cpu::thread_scratch(sizes.used);
    if (!base) {
      kernel.missing_bytes.store(sizes.used);
      return false;
    }
    Arena arena{static_cast<char*>(base)};
    take(arena);
    return true;
  }

  void first_product(int64_t begin, int64_t end) const {
    Memory m;
    if (!thread_memory(&m)) return;
    RowPrefetcher nothing;  // there is no next task
    for (int64_t h0 = 0; h0 < kernel.args.hidden; h0 += kernel.choice.hidden_chunk) {
      const int64_t chunk = kernel.fc2.chunk_channels(h0);
      const int64_t from = begin > h0 ? begin - h0 : 0, to = end - h0 < chunk ? end - h0 : chunk;
      for (int64_t p = 0; from < to && p < cut.count; ++p) kernel.first_product(h0, from, to, cut, p, nothing, m);
    }
  }

  void second_product(int64_t begin, int64_t end) const {
    Memory m;
    if (!thread_memory(&m)) return;
    for (int64_t h0 = 0; h0 < kernel.args.hidden; h0 += kernel.choice.hidden_chunk)
      for (int64_t p = 0; p < cut.count; ++p) kernel.second_product(h0, begin, end, cut, p, m.spans + spans, m);
    if (kernel.args.moments_out)
      moments_of_tiles(static_cast<const T*>(kernel.args.out), kernel.tasks.tiles, 0, kernel.tasks.tiles.count(),
                       kernel.args.channels, begin, end, kernel.partial);
  }

  static void run_norm(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const SplitBlock*>(context);
    self.kernel.normalise(self.cut, self.spans, 2 * begin, 2 * end, self.shared);
  }
  static void run_first(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const SplitBlock*>(context);
    const int64_t last = end * Gemm::kRows, hidden = self.kernel.args.hidden;
    Gemm::begin();
    self.first_product(begin * Gemm::kRows, last < hidden ? last : hidden);
    Gemm::end();
  }
  static void run_second(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const SplitBlock*>(context);
    const int64_t last = end * Gemm::kRows, channels = self.kernel.args.channels;
    Gemm::begin();
    self.second_product(begin * Gemm::kRows, last < channels ? last : channels);
    Gemm::end();
  }

  void run() {
    const cpu::BlockArgs& args = kernel.args;
    const int64_t bytes = shared_memory(nullptr).bytes;
    void* base = cpu::thread_scratch(bytes, 1);
    if (!base) {
      kernel.missing_bytes.store(bytes);
      return;
    }
    shared = shared_memory(base);
    spans = cut_spans(cut, shared.spans);
    clear_padding<Gemm>(shared.z, cut, args.channels, kernel.depth1);
    for (int64_t h0 = 0; h0 < args.hidden; h0 += kernel.choice.hidden_chunk)
      for (int64_t p = 0; p < kernel.panels; ++p)
        clear_rows<Gemm>(kernel.hidden_panel(h0, p, shared), kernel.fc2.chunk_channels(h0),
                         kernel.fc2.padded_depth(h0));
    // The three steps. Channels of the norm go in pairs, those of the products in kRows.
    args.pool.run(args.channels / 2, &run_norm, this);
    args.pool.run((args.hidden + Gemm::kRows - 1) / Gemm::kRows, &run_first, this);
    if (kernel.missing_bytes.load() == 0)
      args.pool.run((args.channels + Gemm::kRows - 1) / Gemm::kRows, &run_second, this);
  }
};

}  // namespace riformer::RIFORMER_ISA
