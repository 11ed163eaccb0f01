// Values for the checks: drawn, rounded to a dtype, and laid into memory that shows what is written or read beside it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/kernels.h"

namespace kernel_check {

using riformer::DType;
using Values = std::vector<double>;

inline double rounded(double value, DType dtype) {
  return riformer::with_dtype(dtype, [&](auto element) {
    riformer::narrow(static_cast<float>(value), element);
    return static_cast<double>(riformer::widen(element));
  });
}
inline const char* name_of(DType dtype) {
  return riformer::with_dtype(dtype, [](auto element) { return riformer::ElementTraits<decltype(element)>::kName; });
}

// The same numbers on every machine: splitmix64, and sums of uniform numbers for normal ones.
struct Draw {
  uint64_t state;

  double uniform() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  Values normals(int64_t count, double spread, double mean, DType dtype) {
    Values out(static_cast<size_t>(count));
    for (double& value : out) value = rounded(mean + spread * normal(), dtype);
    return out;
  }
};

// Memory that ends where a page begins that nobody may touch, and has a pattern before it.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = (bytes_ + page - 1) / page * page + page;  // at least one page of pattern
    void* mapped = mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED || mprotect(static_cast<char*>(mapped) + size_, page, PROT_NONE)) {
      std::perror("kernel_check: no memory for a guarded buffer");
      std::exit(2);
    }
    base_ = static_cast<unsigned char*>(mapped);
    mapped_ = size_ + page;
    std::memset(base_, kPattern, size_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }

  unsigned char* data() const { return base_ + size_ - bytes_; }
  size_t bytes() const { return bytes_; }
  bool pattern_is_whole() const {
    for (const unsigned char* at = base_; at < data(); ++at)
      if (*at != kPattern) return false;
    return true;
  }

 private:
  static constexpr unsigned char kPattern = 0xa5;  // as bfloat16 and float16 a small negative number
  unsigned char* base_;
  size_t bytes_, size_, mapped_;
};

// A tensor in guarded memory.
struct Tensor {
  DType dtype;
  int64_t count;
  Guarded memory;

  Tensor(DType dtype_, int64_t count_) : dtype(dtype_), count(count_), memory(count_ * riformer::size_of(dtype_)) {}
  Tensor(DType dtype_, const Values& values) : Tensor(dtype_, static_cast<int64_t>(values.size())) { set(values); }

  void set(const Values& values) const {
    riformer::with_dtype(dtype, [&](auto element) {
      using T = decltype(element);
      for (size_t i = 0; i < values.size(); ++i) {
        T stored;
        riformer::narrow(static_cast<float>(values[i]), stored);
        std::memcpy(memory.data() + i * sizeof(T), &stored, sizeof(T));
      }
    });
  }
  Values get() const {
    Values out(static_cast<size_t>(count));
    riformer::with_dtype(dtype, [&](auto element) {
      using T = decltype(element);
      for (size_t i = 0; i < out.size(); ++i) {
        T stored;
        std::memcpy(static_cast<void*>(&stored), memory.data() + i * sizeof(T), sizeof(T));
        out[i] = static_cast<double>(riformer::widen(stored));
      }
    });
    return out;
  }
  std::vector<unsigned char> bits() const { return {memory.data(), memory.data() + memory.bytes()}; }
  riformer::cpu::Parameter parameter() const { return {memory.data(), dtype}; }
};

// A pool of threads as PyTorch's: a part of [0, count) for each. Their number is the one that `pool` was asked for
// last.
inline int64_t& threads_in_use() {
  static int64_t threads = 1;
  return threads;
}
inline void run_on_threads(int64_t count, void (*task)(int64_t begin, int64_t end, void* context), void* context) {
  const int64_t threads = threads_in_use() < count ? threads_in_use() : count;
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t)
    others.emplace_back([=] { task(count * t / threads, count * (t + 1) / threads, context); });
  if (count > 0) task(0, count / (threads > 0 ? threads : 1), context);
  for (std::thread& other : others) other.join();
}
inline riformer::cpu::Pool pool(int64_t threads) {
  threads_in_use() = threads;
  return {run_on_threads, threads};
}

}  // namespace kernel_check
