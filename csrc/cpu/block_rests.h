// The rests of a block (rests.h): what block.h does with a panel, for a panel of rests. Its z and its hidden channels
// lie token by token, and so do the sums of the second product until they are finished.
#pragma once

#include "block.h"

namespace riformer::RIFORMER_ISA {

template <class T, class Gemm>
struct BlockRests {
  using Kernel = BlockKernel<T, Gemm>;
  using Memory = typename Kernel::Memory;
  using Element = typename Gemm::Element;
  static constexpr int kTokens = Gemm::kTokens;

  const Kernel& kernel;
  const Panels& cut;
  int64_t panel;
  const Memory& m;

  // hidden = gelu(W1 z + b1); see BlockKernel::first_product.
  void first_product(int64_t h0, int64_t begin, int64_t end) const {
    const WeightRows<Gemm> weight = kernel.fc1.at(0);
    const Element* z = m.rests + (panel - cut.whole) * kernel.depth1 * kTokens;
    Element* hidden = kernel.hidden_panel(h0, panel, m);
    for (int64_t row = begin; row < end; row += Vec::kLanes) {
      const int count = static_cast<int>(end - row < Vec::kLanes ? end - row : Vec::kLanes);
      const Vec bias = Vec::load_n(kernel.fc1_bias + h0 + row, count);
      const auto use = [&](int64_t token, Vec sums) {
        Gemm::gelu(sums + bias).store_n(hidden + token * kernel.depth2 + row, count);
      };
      multiply_rests<Gemm>(weight.data + (h0 + row) * weight.stride, weight.stride, count, z, kernel.depth1,
                           cut.length(panel), kernel.args.channels, use);
    }
  }

  // sums = or += W2 hidden; see BlockKernel::second_product. [first, last) are the panel's spans.
  void second_product(int64_t h0, int64_t begin, int64_t end, const Span* first, const Span* last) const {
    const WeightRows<Gemm> weight = kernel.fc2.at(h0);
    const Element* hidden = kernel.hidden_panel(h0, panel, m);
    const int64_t depth = kernel.fc2.depth(h0);
    float* sums = m.sums + panel * kernel.rows2 * kTokens;
    for (int64_t row = begin; row < end; row += Vec::kLanes) {
      const int count = static_cast<int>(end - row < Vec::kLanes ? end - row : Vec::kLanes);
      const auto use = [&](int64_t token, Vec sum) {
        float* to = sums + token * kernel.rows2 + row;
        if (h0 > 0) sum = Vec::load_n(to, count) + sum;
        sum.store_n(to, count);
        for (int i = 0; first < last && i < count; ++i) m.rows[i * kTokens + token] = to[i];
      };
      multiply_rests<Gemm>(weight.data + row * weight.stride, weight.stride, count, hidden, kernel.depth2,
                           cut.length(panel), depth, use);
      for (int i = 0; first < last && i < count; ++i) kernel.finish(first, last, row + i, m.rows + i * kTokens, m);
    }
  }
};

}  // namespace riformer::RIFORMER_ISA
