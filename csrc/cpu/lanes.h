// Loops over vectors: whole ones, and one with fewer lanes at the end.
#pragma once

#include <cstdint>

namespace riformer::RIFORMER_ISA {

// A function that takes `lanes` takes either this, for a whole vector, or an int, for that many lanes at the end of a
// row. Both have overloads, so that whole vectors need no mask.
struct AllLanes {};

template <class T>
inline Vec load(const T* from, AllLanes) {
  return Vec::load(from);
}
template <class T>
inline Vec load(const T* from, int n) {
  return Vec::load_n(from, n);
}
template <class T>
inline void store(Vec value, T* to, AllLanes) {
  value.store(to);
}
template <class T>
inline void store(Vec value, T* to, int n) {
  value.store_n(to, n);
}

// Sets the other lanes to zero.
inline Vec keep(Vec value, AllLanes) { return value; }
inline Vec keep(Vec value, int n) { return keep_n(value, n); }

// Calls body(first, lanes) for every vector of the elements [0, length); `first` is its first element.
template <class Body>
inline void for_each_vector(int64_t length, Body body) {
  int64_t first = 0;
  for (; first + Vec::kLanes <= length; first += Vec::kLanes) body(first, AllLanes{});
  if (Vec::kLanes > 1 && first < length) body(first, static_cast<int>(length - first));
}

}  // namespace riformer::RIFORMER_ISA
