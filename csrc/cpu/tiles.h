// How the tokens of a call are divided among threads and panels:
//
//   tile    up to 64 neighbouring positions of one image. Moments are taken per tile.
//   task    neighbouring whole tiles, also of several images. A thread works on one task at a time.
//   panel   kTokens tokens of a task, laid out for the matrix product (panel.h).
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

// The tasks of a batch, of at most `wanted` tokens each (or one tile). Where there are tiles enough, the number of
// tasks is a multiple of the number of threads, so that all threads have the same number of them.
struct Tasks {
  Tiles tiles;
  int64_t count, tiles_per_task;

  Tasks(const Tiles& tiles_, int64_t wanted, int64_t threads) : tiles(tiles_) {
    const int64_t total = tiles.count();
    // Counted in tokens, as the last tile of an image may be far shorter than the others (at 7x7: 16, 16, 16 and 1).
    const int64_t positions = tiles.positions > 0 ? tiles.positions : 1;
    const int64_t whole_tiles = wanted / positions * tiles.per_image + wanted % positions / tiles.size;
    const int64_t fit = whole_tiles > 0 ? whole_tiles : 1;
    int64_t tasks = (total + fit - 1) / fit;
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

// Writes the spans of tiles [first, last) to `spans` and returns how many there are. *tokens receives the number of
// tokens, which fill the panels without gaps.
inline int cut_spans(const Tiles& tiles, int64_t first, int64_t last, int panel_tokens, Span* spans, int64_t* tokens) {
  int count = 0;
  int64_t next = 0;  // token of the task
  int64_t tile = first;
  while (tile < last) {
    const int64_t image = tiles.image(tile);
    int64_t position = tiles.start(tile);
    int64_t left = 0;  // positions of this image
    for (; tile < last && tiles.image(tile) == image; ++tile) left += tiles.length(tile);
    while (left > 0) {
      const int token = static_cast<int>(next % panel_tokens);
      const int64_t room = panel_tokens - token;
      const int length = static_cast<int>(left < room ? left : room);
      spans[count++] = {image, position, static_cast<int>(next / panel_tokens), token, length};
      position += length;
      next += length;
      left -= length;
    }
  }
  *tokens = next;
  return count;
}

inline int64_t max_spans(const Tasks& tasks, int panel_tokens) {
  return tasks.tiles_per_task + tasks.max_tokens() / panel_tokens + 2;
}

}  // namespace riformer::RIFORMER_ISA
