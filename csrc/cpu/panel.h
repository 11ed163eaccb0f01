// Panels: tokens as the matrix product reads them, one row per input or hidden channel k, tokens side by side.
//
// A panel type belongs to a product (gemm.h) and is filled two rows at a time. `embed` gathers its panels from an
// image: there a cell is the elements that one output position contributes to rows k and k + 1.
#pragma once

#include <cstdint>

#include "lanes.h"
#include "tiles.h"

namespace riformer::RIFORMER_ISA {

// Panels of float32, [k][kTokens]. A cell is one element, and rows k and k + 1 are gathered from different cells.
template <int kTokens_>
struct FloatPanel {
  using Element = float;
  static constexpr int kTokens = kTokens_;
  static constexpr int kCell = 1;  // elements

  static Element* at(Element* panel, int64_t k, int64_t token) { return panel + k * kTokens + token; }

  static Element get(const Element* panel, int64_t k, int64_t token) { return panel[k * kTokens + token]; }

  // Writes one vector to row k and one to row k + 1, from `token` on.
  template <class Lanes>
  static void put(Element* panel, int64_t k, int64_t token, Vec a, Vec b, Lanes lanes) {
    store(a, at(panel, k, token), lanes);
    store(b, at(panel, k + 1, token), lanes);
  }
  // Copies n cells to each of the two rows at `to`. Without kSecond the second row becomes zero.
  template <bool kSecond>
  static void copy(Element* to, const Element* first, const Element* second, int n) {
    put(to, 0, 0, Vec::load_n(first, n), kSecond ? Vec::load_n(second, n) : Vec::zero(), n);
  }
  // Makes `count` cells: the cell j is row[step * j].
  static void take_every(const Element* row, int64_t step, int64_t count, Element* to) {
    if (step == 2)
      for (int64_t j = 0; j < count; ++j) to[j] = row[2 * j];
    else if (step == 4)
      for (int64_t j = 0; j < count; ++j) to[j] = row[4 * j];
    else
      for (int64_t j = 0; j < count; ++j) to[j] = row[step * j];
  }
};

// The panels of a task, the tiles [first, last), for a product.
template <class Gemm>
inline Panels panels_of(const Tiles& tiles, int64_t first, int64_t last) {
  return Panels(tiles, first, last, Gemm::kTokens, Vec::kLanes, Gemm::kMostRest);
}

// The vectors that hold tokens in one panel.
inline int vectors_in(const Panels& panels, int64_t panel) {
  return static_cast<int>((panels.length(panel) + Vec::kLanes - 1) / Vec::kLanes);
}

// Sets the rows [depth, padded) of a panel to zero.
template <class Gemm>
inline void clear_rows(typename Gemm::Element* panel, int64_t depth, int64_t padded) {
  for (int64_t k = depth; k < padded; k += 2)
    for (int token = 0; token < Gemm::kTokens; token += Vec::kLanes)
      Gemm::put(panel, k, token, Vec::zero(), Vec::zero(), AllLanes{});
}

// Sets to zero what the products read of a task's panels and no span writes: the lanes past the last token of the whole
// panels, and the rows [depth, padded) of every panel.
template <class Gemm>
inline void clear_padding(typename Gemm::Element* elements, const Panels& panels, int64_t depth, int64_t padded) {
  for (int64_t p = 0; p < panels.count; ++p) clear_rows<Gemm>(elements + p * padded * Gemm::kTokens, depth, padded);
  if (panels.whole == 0) return;
  const int64_t last = panels.whole - 1;
  const int used = static_cast<int>(panels.length(last)), edge = vectors_in(panels, last) * Vec::kLanes;
  typename Gemm::Element* ragged = elements + last * padded * Gemm::kTokens;
  for (int64_t k = 0; k < depth && used < edge; k += 2)
    for (int token = used; token < edge; token += Vec::kLanes) {
      const int n = edge - token < Vec::kLanes ? edge - token : Vec::kLanes;
      Gemm::put(ragged, k, token, Vec::zero(), Vec::zero(), n);
    }
}

}  // namespace riformer::RIFORMER_ISA
