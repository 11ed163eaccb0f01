// Runs CUDA kernels on the CPU, for the tests. Every thread of a cluster of thread blocks is a fibre: a stack of its
// own, switched by hand whenever a thread has to wait for others.
//
// The emulator is strict where a GPU would be silent:
//   - shared memory starts as NaN;
//   - asynchronous copies and products happen at a random moment between their start and the wait for them, at the
//     earliest and at the latest moment included;
//   - warps run in a random order;
//   - lanes of a warp that reach different collective instructions are an error, and so are a barrier that is never
//     completed and an access outside shared memory.
// The random order follows a seed (`set_seed`), so that a failure can be repeated.
//
// The emulator cannot show whether the PTX of a function does what the function's name says, how long anything takes,
// and faults that need threads that really run at the same time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "../common/dtypes.h"

namespace riformer::emulator {

constexpr int kWarp = 32, kWarpgroup = 128;  // threads

struct Grid {
  int64_t thread_blocks;
  int cluster;
  int threads;
  int64_t shared_bytes;
};

// Throws std::runtime_error when a kernel does what a GPU would not forgive. The text names the kernel, the thread
// block and the thread.
void run(const Grid& grid, const std::string& name, const std::function<void()>& kernel);
void set_seed(uint64_t seed);
void set_shared_limit(int64_t bytes);  // of a thread block

int thread_index();
int64_t thread_block_index();
int64_t thread_block_count();
unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);

void sync_thread_block();
void sync_warp();
void sync_named(int id, int threads);
float shuffle_xor(float value, int mask);

void copy_async_16(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

void load_matrix_x4(uint32_t (&out)[4], const void* row);
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], DType dtype);

// What follows is for the instructions themselves: those of sm_80 are in ampere.cpp, those of sm_90a in hopper.cpp.
[[noreturn]] void fail(const std::string& what);
// Says that something changed for which a thread may be waiting.
void happened();
void wait_until(const std::function<bool()>& done, const char* what);
// True or false at random.
bool coin();
// Runs `action` at a random later moment, at the latest when no thread can go on.
void later(std::function<void()> action);
// Waits until all `lanes` threads have called this: 32 are the warp, 128 the warpgroup. The last one runs `action` on
// the arguments of all.
void meet(int lanes, const char* what, void* argument, const std::function<void(void**)>& action);
int cluster_size();
int cluster_rank();
unsigned char* shared_memory_of(int rank);  // of another thread block of the cluster
unsigned char* async_view_of(int rank);     // shared memory as the copy engine and wgmma see it
int64_t shared_bytes();
void publish_to_async_view();  // fence.proxy.async: what was stored becomes visible in that view
void sync_cluster();
int warp_lanes();  // of the calling thread's warp
// The value of an operand of a matrix product. Fails by name on a dtype whose elements are not 16 bits wide.
inline float operand_value(uint16_t bits, DType dtype) {
  return with_dtype(dtype, [=](auto element) {
    if constexpr (sizeof(element) == 2)
      return widen(decltype(element){bits});
    else
      fail(std::string("a matrix product of ") + ElementTraits<decltype(element)>::kName + " values");
    return 0.f;
  });
}

// What the instructions remember about a thread or a warpgroup; null until the first of them sets it.
struct State {
  virtual ~State() = default;
  // What the thread or warpgroup has left undone, when it ends; null for nothing.
  virtual const char* unfinished() const { return nullptr; }
};
std::shared_ptr<State>& thread_state();
std::shared_ptr<State>& warpgroup_state();

}  // namespace riformer::emulator
