// bfloat16 products in AMX tiles.
#pragma once

#include <cstdint>

#include "amx_tile.h"
#include "gemm_avx512_bf16.h"

namespace riformer::RIFORMER_ISA {

// 32 rows of weights times 32 tokens, 32 k at a time. Tiles 0 to 3 are the sums, two rows of tiles with two each; tiles
// 4 and 5 are weights of the upper and the lower rows, 6 and 7 the left and the right half of the panel. With kUsed = 1
// the right half is left out.
struct GemmAmx : PairPanel<2 * Vec::kLanes> {
  static constexpr int kStep = 32;
  static constexpr int kRows = 32;
  static constexpr int kVectors = 2;
  static constexpr int64_t kMostRest = 0;
  static constexpr bool kFetches = false;

  template <int kUsed>
  static void run(const Element* weight, int64_t stride, const Element* panel, int64_t depth, float* c,
                  bool accumulate) {
    constexpr int64_t kRowBytes = kTokens * 4;  // of c, and of a pair of rows of the panel
    float* lower = c + kTileRows * kTokens;
    // The sums so far, or zeros.
    if (accumulate) {
      TILE_LOAD(0, c, kRowBytes);
      TILE_LOAD(2, lower, kRowBytes);
      if (kUsed > 1) TILE_LOAD(1, c + 16, kRowBytes);
      if (kUsed > 1) TILE_LOAD(3, lower + 16, kRowBytes);
    } else {
      TILE_ZERO(0);
      TILE_ZERO(2);
      if (kUsed > 1) TILE_ZERO(1);
      if (kUsed > 1) TILE_ZERO(3);
    }
    // Every 32 k: four products from four loaded tiles.
    for (int64_t k = 0; k < depth; k += kStep) {
      const Element* b = panel + k * kTokens;
      TILE_LOAD(4, weight + k, stride * 2);
      TILE_LOAD(6, b, kRowBytes);
      TILE_MULTIPLY(0, 4, 6);
      if (kUsed > 1) TILE_LOAD(7, b + 32, kRowBytes);
      if (kUsed > 1) TILE_MULTIPLY(1, 4, 7);
      TILE_LOAD(5, weight + kTileRows * stride + k, stride * 2);
      TILE_MULTIPLY(2, 5, 6);
      if (kUsed > 1) TILE_MULTIPLY(3, 5, 7);
    }
    // The sums, back to memory.
    TILE_STORE(0, c, kRowBytes);
    TILE_STORE(2, lower, kRowBytes);
    if (kUsed > 1) TILE_STORE(1, c + 16, kRowBytes);
    if (kUsed > 1) TILE_STORE(3, lower + 16, kRowBytes);
  }

  static Vec gelu(Vec x) { return gelu_bfloat16(x); }
  // A thread owns the tile registers between these two.
  static void begin() { tiles_configure(); }
  static void end() { tiles_release(); }
};

}  // namespace riformer::RIFORMER_ISA
