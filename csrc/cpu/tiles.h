// How the tokens of a call are divided among threads and panels:
//
//   tile    up to 64 neighbouring positions of one image. Moments are taken per tile.
//   task    neighbouring whole tiles, also of several images. A thread works on one task at a time.
//   panel   up to kTokens tokens of a task, laid out for the matrix product (panel.h).
//   rest    a last tile of an image with so few tokens that a vector of them would be nearly empty (rests.h). The rests
//           of a task have panels of their own, behind the others.
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
  // Whether a tile is a rest, with `most` as the most tokens of one.
  bool is_rest(int64_t tile, int64_t most) const { return length(tile) <= most; }
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

// The fewest and the most tokens that a task should take, however wide or narrow the widths are. With fewer, reading
// the weights takes longer than what fits into the caches saves: float32 at C = 512 takes 5 % longer with 96 tokens, at
// C = 768 37 % longer with 48 (bench/notes/2026-11-22-cpu-rests-and-fetching.md).
constexpr int64_t kLeastTaskTokens = 240, kMostTaskTokens = 400;

inline int64_t task_tokens(int64_t fit) {
  return fit < kLeastTaskTokens ? kLeastTaskTokens : (fit < kMostTaskTokens ? fit : kMostTaskTokens);
}

// Whether the threads should share the channels and not the tokens: with less than a task of tokens for each thread,
// all of them would read all weights, which takes most of the time at batch 1 (bench/notes/2026-11-21-cpu-batch-1.md).
inline bool few_tokens(const Tasks& tasks, int64_t threads, int64_t most = kMostTaskTokens) {
  return threads > 1 && tasks.count <= threads && tasks.tiles.batch * tasks.tiles.positions <= most;
}

struct Span {
  int64_t image, position;  // where it starts in the tensor
  int panel, token;         // where it starts in the task: token of the panel
  int length;
};

// How the tokens of the tiles [first, last), a task, are cut into panels of at most `size` tokens.
//
// The first `whole` panels hold all tokens but the rests. All of them are full but the last two, which get the same
// number of vectors, or nearly: a product of a single vector takes two thirds of the time of one of two, as its few
// sums wait for each other (bench/notes/2026-11-21-cpu-network.md). The panels [whole, count) hold the rests.
struct Panels {
  const Tiles& tiles;
  int64_t first, last;
  int64_t size, most_rest;  // most_rest: the most tokens of a tile that is a rest
  int64_t tokens = 0, rests = 0;
  int64_t whole, count;
  int64_t shared;  // tokens of the panel before the last whole one

  Panels(const Tiles& tiles_, int64_t first_, int64_t last_, int64_t size_, int64_t lanes, int64_t most_rest_)
      : tiles(tiles_), first(first_), last(last_), size(size_), most_rest(most_rest_), shared(size_) {
    for (int64_t tile = first; tile < last; ++tile)
      (tiles.is_rest(tile, most_rest) ? rests : tokens) += tiles.length(tile);
    whole = (tokens + size - 1) / size;
    count = whole + (rests + size - 1) / size;
    if (whole < 2) return;
    const int64_t vectors = (tokens - (whole - 2) * size + lanes - 1) / lanes;
    shared = (vectors + 1) / 2 * lanes;
  }
  bool is_rest(int64_t panel) const { return panel >= whole; }
  int64_t length(int64_t panel) const {
    if (is_rest(panel)) return shorter(rests - (panel - whole) * size);
    return start(panel + 1) - start(panel);
  }

 private:
  int64_t shorter(int64_t left) const { return left < size ? left : size; }
  // The first token of a whole panel; `tokens` behind the last one.
  int64_t start(int64_t panel) const {
    if (panel >= whole) return tokens;
    return panel > 0 && panel == whole - 1 ? (whole - 2) * size + shared : panel * size;
  }
};

// Writes the spans of a task to `spans`, in the order of the panels, whose tokens they fill without gaps. Returns how
// many.
inline int cut_spans(const Panels& panels, Span* spans) {
  const Tiles& tiles = panels.tiles;
  int count = 0, panel = 0;
  int64_t token = 0;  // of the panel
  const auto add = [&](int64_t image, int64_t position, int64_t left) {
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
  };
  for (int64_t tile = panels.first; tile < panels.last;) {
    const int64_t image = tiles.image(tile), position = tiles.start(tile);
    int64_t left = 0;  // positions of this image
    for (; tile < panels.last && tiles.image(tile) == image; ++tile)
      if (!tiles.is_rest(tile, panels.most_rest)) left += tiles.length(tile);
    add(image, position, left);
  }
  if (panels.rests == 0) return count;
  panel = static_cast<int>(panels.whole);
  token = 0;
  for (int64_t tile = panels.first; tile < panels.last; ++tile)
    if (tiles.is_rest(tile, panels.most_rest)) add(tiles.image(tile), tiles.start(tile), tiles.length(tile));
  return count;
}

// The most panels of rests that a task has, the most panels and the most spans.
inline int64_t max_rest_panels(const Tasks& tasks, int panel_tokens, int64_t most_rest) {
  const Tiles& tiles = tasks.tiles;
  if (tasks.count == 0 || !tiles.is_rest(tiles.per_image - 1, most_rest)) return 0;
  const int64_t length = tiles.length(tiles.per_image - 1);
  const int64_t images = (tasks.tiles_per_task + tiles.per_image - 1) / tiles.per_image + 1;
  return (images * length + panel_tokens - 1) / panel_tokens;
}
inline int64_t max_panels(const Tasks& tasks, int panel_tokens, int64_t most_rest) {
  return (tasks.max_tokens() + panel_tokens - 1) / panel_tokens + max_rest_panels(tasks, panel_tokens, most_rest);
}
inline int64_t max_spans(const Tasks& tasks, int panel_tokens) {
  return 2 * tasks.tiles_per_task + tasks.max_tokens() / panel_tokens + 3;
}

}  // namespace riformer::RIFORMER_ISA
