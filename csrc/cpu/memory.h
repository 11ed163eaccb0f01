// Working memory of one call. thread_scratch (kernels.h) is what lasts longer.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace riformer::RIFORMER_ISA {

// Hands out aligned parts of one allocation. With a null base it hands out null and only adds up `used`: a caller runs
// the same function twice, first to learn the size and then to get the parts.
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

// Memory that is freed with this object; `data` is null when there was none.
struct Buffer {
  void* data;
  explicit Buffer(int64_t bytes) : data(std::malloc(static_cast<size_t>(bytes > 0 ? bytes : 1))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

}  // namespace riformer::RIFORMER_ISA
