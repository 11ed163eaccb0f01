// How the tokens of a call are divided among threads and panels:
//
//   tile    up to 64 neighbouring positions of one image. Moments are taken per tile.
//   task    neighbouring whole tiles, also of several images. A thread works on one task at a time.
//   panel   up to kTokens tokens of a task, laid out for the matrix product (panel.h).
//   span    neighbouring positions of one image within one panel: memory without a gap, in each channel.
#pragma once

#include <cstdint>

namespace riformer::RIFORMER_ISA {

// The tiles of a batch. Moments are merged tile after tile, so their last bits depend on where the tiles end. For an
// image to give the same bits in any batch, that must depend on its number of positions alone.
struct Tiles {
  int64_t batch, positions, size, per_image;

  Tiles(int64_t batch_, int64_t positions_)
      : batch(batch_),
        positions(positions_),
        size(positions_ <= 256 ? 16 : 64),
        per_image((positions_ + size - 1) / size) {}

  int64_t count() const { return batch * per_image; }
  int64_t image(int64_t tile) const { return tile / per_image; }
  int64_t start(int64_t tile) const { return tile % per_image * size; }
  int64_t length(int64_t tile) const {
    const int64_t left = positions - start(tile);
    return left < size ? left : size;
  }
};

// The tasks of a batch, of about `wanted` tokens each: they end where tiles end. Where there are tiles enough, the
// number of tasks is a multiple of the number of threads, so that all threads have the same number of them.
struct Tasks {
  Tiles tiles;
  int64_t count, tiles_per_task;

  Tasks(const Tiles& tiles_, int64_t wanted, int64_t threads) : tiles(tiles_) {
    const int64_t total = tiles.count(), tokens = tiles.batch * tiles.positions;
    // Counted in tokens, as the last tile of an image may be far shorter than the others (at 7x7: 16, 16, 16 and 1).
    int64_t tasks = (tokens + wanted - 1) / wanted;
    tasks = (tasks + threads - 1) / threads * threads;
    count = tasks < total ? tasks : total;
    tiles_per_task = count > 0 ? (total + count - 1) / count : 0;
  }
  // The first tile of a task.
  int64_t first(int64_t task) const { return task * tiles.count() / count; }
  int64_t max_tokens() const {
    if (tiles_per_task == 0) return 0;
    const int64_t rest = tiles_per_task % tiles.per_image * tiles.size;
    return tiles_per_task / tiles.per_image * tiles.positions + (rest < tiles.positions ? rest : tiles.positions);
  }
};

struct Span {
  int64_t image, position;  // where it starts in the tensor
  int panel, token;         // where it starts in the task: token of the panel
  int length;
};

// How the tokens of a task are cut into panels of at most `size` tokens. All are full but the last two, which get the
// same number of vectors, or nearly: a product of a single vector takes two thirds of the time of one of two, as its
// few sums wait for each other (bench/notes/2026-11-21-cpu-network.md).
struct Panels {
  int64_t tokens, size, count, shared;  // shared: tokens of the last panel but one

  Panels(int64_t tokens_, int64_t size_, int64_t lanes)
      : tokens(tokens_), size(size_), count((tokens_ + size_ - 1) / size_), shared(size_) {
    if (count < 2) return;
    const int64_t vectors = (tokens - (count - 2) * size + lanes - 1) / lanes;
    shared = (vectors + 1) / 2 * lanes;
  }
  // The first token of a panel; `tokens` behind the last one.
  int64_t start(int64_t panel) const {
    if (panel >= count) return tokens;
    return panel > 0 && panel == count - 1 ? (count - 2) * size + shared : panel * size;
  }
  int64_t length(int64_t panel) const { return start(panel + 1) - start(panel); }
};

// The tokens of tiles [first, last).
inline int64_t tokens_of(const Tiles& tiles, int64_t first, int64_t last) {
  int64_t tokens = 0;
  for (int64_t tile = first; tile < last; ++tile) tokens += tiles.length(tile);
  return tokens;
}

// Writes the spans of tiles [first, last), whose tokens fill the panels without gaps, to `spans`. Returns how many.
inline int cut_spans(const Tiles& tiles, int64_t first, int64_t last, const Panels& panels, Span* spans) {
  int count = 0, panel = 0;
  int64_t token = 0;  // of the panel
  int64_t tile = first;
  while (tile < last) {
    const int64_t image = tiles.image(tile);
    int64_t position = tiles.start(tile);
    int64_t left = 0;  // positions of this image
    for (; tile < last && tiles.image(tile) == image; ++tile) left += tiles.length(tile);
    while (left > 0) {
      if (token == panels.length(panel)) {
        ++panel;
        token = 0;
      }
      const int64_t room = panels.length(panel) - token;
      const int length = static_cast<int>(left < room ? left : room);
      spans[count++] = {image, position, panel, static_cast<int>(token), length};
      position += length;
      token += length;
      left -= length;
    }
  }
  return count;
}

inline int64_t max_spans(const Tasks& tasks, int panel_tokens) {
  return tasks.tiles_per_task + tasks.max_tokens() / panel_tokens + 2;
}

}  // namespace riformer::RIFORMER_ISA
