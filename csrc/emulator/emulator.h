// Runs CUDA kernels on the CPU, thread by thread: every thread of a cluster of thread blocks is a fibre.
//
// For tests. It is strict where a GPU would be silent: shared memory starts as NaN; asynchronous copies and products
// happen at a random moment between their start and the wait for them (the earliest and the latest included); warps run
// in a random order; lanes of a warp that reach different collective instructions, a barrier that is never completed
// and accesses outside shared memory are errors. The order follows a seed (`set_seed`), so that a failure can be
// repeated. What it cannot show: whether the PTX says what the function's name says, timing, and what needs real
// concurrency.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace riformer::emulator {

struct Grid {
  int64_t blocks;
  int cluster;
  int threads;
  int64_t shared_bytes;
};

// Throws std::runtime_error with `name`, block and thread when a kernel does what a GPU would not forgive.
void run(const Grid& grid, const std::string& name, const std::function<void()>& kernel);
void set_seed(uint64_t seed);
void set_shared_limit(int64_t bytes);  // of a thread block

int thread_index();
int64_t block_index();
int64_t block_count();
unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);

void sync_block();
void sync_warp();
void sync_named(int id, int threads);
float shuffle_xor(float value, int mask);

void copy_async_16(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

void load_matrix_x4(uint32_t (&out)[4], const void* row, bool transposed);
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16);

// The parts that instructions are made of, those of sm_80 in ampere.cpp and those of sm_90a in hopper.cpp.
[[noreturn]] void fail(const std::string& what);
void happened();  // something that a waiting thread may wait for
void wait_until(const std::function<bool()>& done, const char* what);
bool coin();
// Runs `action` at a random later moment, at the latest when nothing else can go on.
void later(std::function<void()> action);
// All `lanes` threads (32: the warp, 128: the warpgroup) meet; the last one runs `action` on their arguments.
void meet(int lanes, const char* what, void* argument, const std::function<void(void**)>& action);
int cluster_size();
int cluster_rank();
unsigned char* shared_memory_of(int rank);  // of another block of the cluster
unsigned char* async_view_of(int rank);     // shared memory as the copy engine and wgmma see it
int64_t shared_bytes();
void publish_to_async_view();  // fence.proxy.async: what was stored becomes visible there
void sync_cluster();
int warp_lanes();  // of the calling thread's warp

// What an instruction remembers about a thread or a warpgroup; empty at first.
struct State {
  virtual ~State() = default;
  virtual const char* unfinished() const { return nullptr; }  // at the thread's end
};
std::shared_ptr<State>& thread_state();
std::shared_ptr<State>& warpgroup_state();

}  // namespace riformer::emulator
