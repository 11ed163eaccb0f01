// A convolution whose threads share the channels and not the tokens. It serves few tokens, where otherwise each thread
// would read all weights. There are two steps, and all threads finish the first before the second begins: the panels of
// all input channels, with the chunks shared out, and the products, with the channels shared out. Sums are taken in the
// same order as in embed.h, so the results are the same to the bit.
#pragma once

#include "embed.h"

namespace riformer::RIFORMER_ISA {

template <class X, class T, class Gemm>
struct SplitEmbed {
  using Kernel = EmbedKernel<X, T, Gemm>;
  using Memory = typename Kernel::Memory;
  using Element = typename Gemm::Element;

  Kernel& kernel;
  Panels cut;
  Memory shared{};  // the panels and rests of all chunks, and the spans of the whole batch
  int spans = 0;

  explicit SplitEmbed(Kernel& kernel_)
      : kernel(kernel_), cut(panels_of<Gemm>(kernel_.tasks.tiles, 0, kernel_.tasks.tiles.count())) {}

  Memory shared_memory(void* base) const {
    Arena arena{static_cast<char*>(base)};
    Memory m{};
    m.panels = arena.take<Element>(kernel.chunks() * kernel.panel_elements());
    m.rests = arena.take<Element>(kernel.chunks() * kernel.rest_elements());
    m.spans = arena.take<Span>(max_spans(kernel.tasks, Gemm::kTokens));
    m.bytes = arena.used;
    return m;
  }
  // The shared parts for one chunk of input channels, together with the calling thread's own; false when there was no
  // memory.
  bool memory_of(int64_t chunk, Memory* m) const {
    const int64_t bytes = kernel.memory(nullptr).bytes;
    void* base = cpu::thread_scratch(bytes);
    if (!base) {
      kernel.missing_bytes.store(bytes);
      return false;
    }
    *m = kernel.memory(base);
    m->panels = shared.panels + chunk * kernel.panel_elements();
    m->rests = shared.rests + chunk * kernel.rest_elements();
    m->spans = shared.spans;
    return true;
  }

  static void run_gather(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const SplitEmbed*>(context);
    Memory m;
    for (int64_t chunk = begin; chunk < end && self.memory_of(chunk, &m); ++chunk)
      self.kernel.gather_panels(chunk * self.kernel.weights.chunk, self.cut, self.spans, m);
  }
  static void run_multiply(int64_t begin, int64_t end, void* context) {
    const auto& self = *static_cast<const SplitEmbed*>(context);
    const Kernel& kernel = self.kernel;
    const int64_t channels = kernel.args.channels, first = begin * Gemm::kRows;
    const int64_t last = end * Gemm::kRows < channels ? end * Gemm::kRows : channels;
    Gemm::begin();
    Memory m;
    for (int64_t chunk = 0; chunk < kernel.chunks() && self.memory_of(chunk, &m); ++chunk)
      kernel.multiply_panels(chunk * kernel.weights.chunk, first, last, self.cut, m.spans + self.spans, m);
    Gemm::end();
    if (kernel.args.moments_out)
      moments_of_tiles(static_cast<const T*>(kernel.args.out), kernel.tasks.tiles, 0, kernel.tasks.tiles.count(),
                       channels, first, last, kernel.partial);
  }

  void run() {
    const int64_t bytes = shared_memory(nullptr).bytes;
    void* base = cpu::thread_scratch(bytes, 1);
    if (!base) {
      kernel.missing_bytes.store(bytes);
      return;
    }
    shared = shared_memory(base);
    spans = cut_spans(cut, shared.spans);
    kernel.args.pool.run(kernel.chunks(), &run_gather, this);
    if (kernel.missing_bytes.load() == 0)
      kernel.args.pool.run((kernel.args.channels + Gemm::kRows - 1) / Gemm::kRows, &run_multiply, this);
  }
};

}  // namespace riformer::RIFORMER_ISA
