// thread_scratch of kernels.h.
#include <cstdlib>

#include "kernels.h"

namespace riformer::cpu {
namespace {

struct Scratch {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

void* thread_scratch(int64_t bytes, int slot) {
  static thread_local Scratch slots[3];
  Scratch& scratch = slots[slot];
  if (bytes > scratch.bytes) {
    std::free(scratch.data);
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data = std::aligned_alloc(4096, static_cast<size_t>(rounded));
    scratch.bytes = scratch.data ? rounded : 0;
  }
  return scratch.data;
}

}  // namespace riformer::cpu
