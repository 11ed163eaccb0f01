// How tokens are cut up: tiles that own their moments, tasks that are runs of tiles, and the pieces of a task.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace riformer::RIFORMER_ISA {

using cpu::Parameter;
using cpu::Pool;

// All lanes of a vector, where a number would say how many.
struct Full {};

template <class T>
inline Vec load(const T* from, Full) {
  return Vec::load(from);
}
template <class T>
inline Vec load(const T* from, int n) {
  return Vec::load_n(from, n);
}
template <class T>
inline void store(Vec value, T* to, Full) {
  value.store(to);
}
template <class T>
inline void store(Vec value, T* to, int n) {
  value.store_n(to, n);
}

// The other lanes zero.
inline Vec keep(Vec value, Full) { return value; }
inline Vec keep(Vec value, int n) { return keep_n(value, n); }

// body(first, lanes) for vectors of elements [0, length): lanes is Full, and a number for what is left at the end.
template <class Body>
inline void for_each_vector(int64_t length, Body body) {
  int64_t first = 0;
  for (; first + Vec::kLanes <= length; first += Vec::kLanes) body(first, Full{});
  if (Vec::kLanes > 1 && first < length) body(first, static_cast<int>(length - first));
}

// A tile is a fixed run of positions of one image. The moments are taken per tile and merged in order, so the cut must
// not depend on the batch or on the threads: it is a function of the number of positions alone.
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

// Tasks are runs of whole tiles of at most `wanted` tokens (or one tile), as many as there are threads or a multiple of
// it.
struct Tasks {
  Tiles tiles;
  int64_t count, tiles_per_task;

  Tasks(const Tiles& tiles_, int64_t wanted, int64_t threads) : tiles(tiles_) {
    const int64_t total = tiles.count();
    // Counted in tokens, as the last tile of an image may be far shorter than the others (at 7x7: 16, 16, 16 and 1).
    const int64_t positions = tiles.positions > 0 ? tiles.positions : 1;
    const int64_t run = wanted / positions * tiles.per_image + wanted % positions / tiles.size;
    const int64_t fit = run > 0 ? run : 1;
    int64_t tasks = (total + fit - 1) / fit;
    tasks = (tasks + threads - 1) / threads * threads;
    count = tasks < total ? tasks : total;
    tiles_per_task = count > 0 ? (total + count - 1) / count : 0;
  }
  int64_t first(int64_t task) const { return task * tiles.count() / count; }
  int64_t max_tokens() const {
    if (tiles_per_task == 0) return 0;
    const int64_t rest = tiles_per_task % tiles.per_image * tiles.size;
    return tiles_per_task / tiles.per_image * tiles.positions + (rest < tiles.positions ? rest : tiles.positions);
  }
};

// A piece is a run of positions of one image that lies in one panel.
struct Piece {
  int64_t image, position;
  int panel, token, length;
};

// The pieces of tiles [first, last), their tokens numbered one after the other. Returns their count; *tokens receives
// the number of tokens.
inline int cut_pieces(const Tiles& tiles, int64_t first, int64_t last, int panel_tokens, Piece* pieces,
                      int64_t* tokens) {
  int count = 0;
  int64_t lane = 0;
  int64_t tile = first;
  while (tile < last) {
    const int64_t image = tiles.image(tile);
    int64_t position = tiles.start(tile);
    int64_t length = 0;
    for (; tile < last && tiles.image(tile) == image; ++tile) length += tiles.length(tile);
    while (length > 0) {
      const int token = static_cast<int>(lane % panel_tokens);
      const int64_t room = panel_tokens - token;
      const int run = static_cast<int>(length < room ? length : room);
      pieces[count++] = {image, position, static_cast<int>(lane / panel_tokens), token, run};
      position += run;
      lane += run;
      length -= run;
    }
  }
  *tokens = lane;
  return count;
}

inline int64_t max_pieces(const Tasks& tasks, int panel_tokens) {
  return tasks.tiles_per_task + tasks.max_tokens() / panel_tokens + 2;
}

// Vectors in use in panel `panel` of a task with `tokens` tokens.
template <class Gemm>
inline int vectors_in(int64_t tokens, int64_t panel) {
  const int64_t left = tokens - panel * Gemm::kTokens;
  const int64_t vectors = (left + Vec::kLanes - 1) / Vec::kLanes;
  return static_cast<int>(vectors < Gemm::kVectors ? vectors : Gemm::kVectors);
}

// Zero rows [depth, padded) of a panel.
template <class Gemm>
inline void clear_rows(typename Gemm::Element* panel, int64_t depth, int64_t padded) {
  for (int64_t k = depth; k < padded; k += 2)
    for (int token = 0; token < Gemm::kTokens; token += Vec::kLanes)
      Gemm::put(panel, k, token, Vec::zero(), Vec::zero(), Full{});
}

// Zero what no piece writes: the lanes past the last token, and the rows between depth and padded depth.
template <class Gemm>
inline void clear_padding(typename Gemm::Element* panels, int64_t tokens, int64_t depth, int64_t padded) {
  const int64_t count = (tokens + Gemm::kTokens - 1) / Gemm::kTokens;
  const int64_t last = count - 1;
  const int used = static_cast<int>(tokens - last * Gemm::kTokens);
  const int edge = vectors_in<Gemm>(tokens, last) * Vec::kLanes;
  typename Gemm::Element* ragged = panels + last * padded * Gemm::kTokens;
  for (int64_t k = 0; k < depth && used < edge; k += 2)
    for (int token = used; token < edge; token += Vec::kLanes) {
      const int n = edge - token < Vec::kLanes ? edge - token : Vec::kLanes;
      Gemm::put(ragged, k, token, Vec::zero(), Vec::zero(), n);
    }
  for (int64_t p = 0; p < count; ++p) clear_rows<Gemm>(panels + p * padded * Gemm::kTokens, depth, padded);
}

// Hands out aligned parts of one allocation; with a null base it only adds up.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* out = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return out;
  }
};

// Calls f with the parameter's values, as a pointer to their own type.
template <class F>
inline auto with_values(const Parameter& parameter, F&& f) {
  return with_dtype(parameter.dtype,
                    [&](auto element) { return f(static_cast<const decltype(element)*>(parameter.data)); });
}

inline double read(const Parameter& parameter, int64_t index, double absent) {
  if (!parameter.data) return absent;
  return with_values(parameter, [&](const auto* values) { return static_cast<double>(widen(values[index])); });
}

inline void read_all(const Parameter& parameter, int64_t count, double absent, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(read(parameter, i, absent));
}

}  // namespace riformer::RIFORMER_ISA
