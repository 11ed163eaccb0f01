// The last tokens of an image where they would leave a vector nearly empty: 14x14 positions are 12 vectors of 16 and 4
// tokens, 7x7 are 3 and one. A product with such a vector costs as much as one with a full vector, which is up to a
// quarter of the time at batch 1.
//
// Therefore these tokens, the rests (tiles.h), are multiplied along k: a vector holds neighbouring weights of a row, as
// they lie in memory, and the same elements of a token. For that, a rest lies in memory token by token, [token][k].
// Which tokens are rests depends on the number of positions alone, so an image gives the same bits in any batch.
#pragma once

#include <cstdint>
#include <cstring>

#include "gemm.h"
#include "tiles.h"

namespace riformer::RIFORMER_ISA {

// Rows [begin, end) of a panel to rows of its first `tokens` tokens, [tokens][pitch].
template <class Gemm>
inline void turn_panel(const typename Gemm::Element* panel, int64_t begin, int64_t end, int64_t tokens, int64_t pitch,
                       typename Gemm::Element* to) {
  for (int64_t k = begin; k < end; ++k)
    for (int64_t token = 0; token < tokens; ++token) to[token * pitch + k] = Gemm::get(panel, k, token);
}

// The products of `count` <= kLanes rows of weights, `stride` apart, with one token. Lane i is row i.
template <class Gemm>
Vec multiply_ragged_rest(const typename Gemm::Element* weight, int64_t stride, int64_t count,
                         const typename Gemm::Element* token, int64_t depth) {
  Vec sums[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) sums[i] = Vec::zero();
  for (int64_t i = 0; i < count; ++i) {
    const typename Gemm::Element* row = weight + i * stride;
    int64_t k = 0;
    for (; k + Gemm::kAlong <= depth; k += Gemm::kAlong)
      sums[i] = Gemm::add_products(row + k, token + k, AllLanes{}, sums[i]);
    if (k < depth) sums[i] = Gemm::add_products(row + k, token + k, static_cast<int>(depth - k), sums[i]);
  }
  return lane_sums(sums);
}

// The same for kRows * kTokens == kLanes rows and tokens, `pitch` apart, and a depth that fills vectors. Lane
// kRows * t + i is row i with token t.
template <class Gemm, int kRows>
inline Vec multiply_whole_rests(const typename Gemm::Element* weight, int64_t stride,
                                const typename Gemm::Element* tokens, int64_t pitch, int64_t depth) {
  constexpr int kTokens = Vec::kLanes / kRows;
  Vec sums[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) sums[i] = Vec::zero();
  for (int64_t k = 0; k < depth; k += Gemm::kAlong)
    for (int i = 0; i < kRows; ++i)
      for (int t = 0; t < kTokens; ++t)
        sums[kRows * t + i] =
            Gemm::add_products(weight + i * stride + k, tokens + t * pitch + k, AllLanes{}, sums[kRows * t + i]);
  return lane_sums(sums);
}

// Calls use(token, sums) for kTokens tokens, with kLanes rows. Every weight is read once for all of them: four tokens
// then take 1.1 to 1.25 times as long as their share of a full vector, and 2.1 times one by one.
template <class Gemm, int kTokens, class Use>
inline void use_whole_rests(const typename Gemm::Element* weight, int64_t stride, const typename Gemm::Element* tokens,
                            int64_t pitch, int64_t depth, int64_t first, Use use) {
  constexpr int kLanes = Vec::kLanes, kRows = kLanes / kTokens;
  if constexpr (kTokens == 1) {
    use(first, multiply_whole_rests<Gemm, kRows>(weight, stride, tokens, pitch, depth));
  } else {
    alignas(64) float sums[kTokens * kLanes], by_token[kTokens][kLanes];
    for (int part = 0; part < kTokens; ++part)
      multiply_whole_rests<Gemm, kRows>(weight + part * kRows * stride, stride, tokens, pitch, depth)
          .store(sums + part * kLanes);
    for (int part = 0; part < kTokens; ++part)
      for (int t = 0; t < kTokens; ++t)
        std::memcpy(by_token[t] + part * kRows, sums + part * kLanes + t * kRows, kRows * sizeof(float));
    for (int t = 0; t < kTokens; ++t) use(first + t, Vec::load(by_token[t]));
  }
}

// The products of `count` <= kLanes rows of weights, `stride` apart, with `tokens` tokens, `pitch` apart. Calls
// use(token, sums) for each; lane i is row i. Every sum is taken in the same order, whichever rows and tokens surround
// it: one vector of partial sums along k, and lane_sums.
template <class Gemm, class Use>
inline void multiply_rests(const typename Gemm::Element* weight, int64_t stride, int64_t count,
                           const typename Gemm::Element* rests, int64_t pitch, int64_t tokens, int64_t depth, Use use) {
  int64_t token = 0;
  if (count < Vec::kLanes || depth % Gemm::kAlong != 0) {
    for (; token < tokens; ++token)
      use(token, multiply_ragged_rest<Gemm>(weight, stride, count, rests + token * pitch, depth));
    return;
  }
  for (; token + 4 <= tokens; token += 4)
    use_whole_rests<Gemm, 4>(weight, stride, rests + token * pitch, pitch, depth, token, use);
  if (token + 2 <= tokens) {
    use_whole_rests<Gemm, 2>(weight, stride, rests + token * pitch, pitch, depth, token, use);
    token += 2;
  }
  if (token < tokens) use_whole_rests<Gemm, 1>(weight, stride, rests + token * pitch, pitch, depth, token, use);
}

}  // namespace riformer::RIFORMER_ISA
