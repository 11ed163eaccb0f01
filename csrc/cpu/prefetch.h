// Prefetching rows that the hardware does not see coming: neighbouring rows of a tensor or of a weight matrix lie too
// far apart for its prefetchers to follow.
#pragma once

#include <cstdint>

namespace riformer::RIFORMER_ISA {

constexpr int64_t kCacheLine = 64;

inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// Spreads the prefetches of `rows` rows over many calls of step(), into the second-level cache.
struct RowPrefetcher {
  const char* row = nullptr;
  int64_t pitch = 0, bytes = 0;  // from row to row; of one row
  int64_t rows = 0;              // that are left
  int64_t lines_per_step = 0;
  int64_t offset = 0;  // of the next line in `row`

  void step() {
    for (int64_t i = 0; i < lines_per_step && rows > 0; ++i) {
      __builtin_prefetch(row + offset, 0, 2);
      offset += kCacheLine;
      if (offset >= bytes) {
        offset = 0;
        row += pitch;
        --rows;
      }
    }
  }
};

}  // namespace riformer::RIFORMER_ISA
