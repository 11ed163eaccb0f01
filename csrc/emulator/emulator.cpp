#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace riformer::emulator {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kNamedBarriers = 16;
constexpr size_t kSharedAlignment = 1024;

// Where the threads of a warp or of a warpgroup meet.
struct Meeting {
  int arrived = 0;
  int64_t generation = 0;
  const char* what = nullptr;
  void* arguments[kWarpgroup] = {};
  std::shared_ptr<State> state;
};

struct Barrier {
  int arrived = 0;
  int expected = 0;
  int64_t generation = 0;
};

struct ThreadBlock {
  int64_t index = 0;
  int rank = 0;
  std::vector<unsigned char> storage, async_storage;
  unsigned char* shared = nullptr;
  unsigned char* async_view = nullptr;
  std::vector<Meeting> warps, warpgroups;
  Barrier named[kNamedBarriers];
};

struct Fibre {
  ThreadBlock* thread_block = nullptr;
  int index = 0;
  bool started = false, finished = false;
  const char* waiting_for = nullptr;
  std::shared_ptr<State> state;
  ucontext_t context{};
  jmp_buf jump{};
  void* stack = nullptr;
};

struct Run {
  Grid grid{};
  std::string name;
  const std::function<void()>* kernel = nullptr;
  std::vector<ThreadBlock> thread_blocks;
  std::vector<Fibre> fibres;
  std::vector<std::function<void()>> deferred;
  Barrier cluster;
  int64_t events = 0;
  std::exception_ptr error;
  jmp_buf scheduler{};
};

thread_local Run* running = nullptr;
thread_local Fibre* current = nullptr;
thread_local std::mt19937_64 generator(0);
thread_local int64_t shared_limit = 232448;  // that of sm_90, which is the largest

// A fibre is entered by setcontext the first time, and then by longjmp, which makes no system call.
void yield() {
  Fibre* self = current;
  if (_setjmp(self->jump) == 0) _longjmp(running->scheduler, 1);
}

void enter() {
  Fibre* self = current;
  try {
    (*running->kernel)();
  } catch (...) {
    if (!running->error) running->error = std::current_exception();
  }
  self->finished = true;
  ++running->events;
  _longjmp(running->scheduler, 1);
}

void resume(Fibre& fibre) {
  current = &fibre;
  if (_setjmp(running->scheduler) == 0) {
    if (fibre.started) _longjmp(fibre.jump, 1);
    fibre.started = true;
    setcontext(&fibre.context);
  }
  current = nullptr;
}

class Stacks {
 public:
  ~Stacks() {
    for (void* stack : stacks_) munmap(stack, kStack);
  }
  void* get(size_t index) {
    while (stacks_.size() <= index) {
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stacks");
      stacks_.push_back(stack);
    }
    return stacks_[index];
  }

 private:
  std::vector<void*> stacks_;
};
thread_local Stacks stacks;

std::string place() {
  std::ostringstream out;
  out << running->name;
  if (current) out << ", thread block " << current->thread_block->index << ", thread " << current->index;
  return out.str();
}

void run_deferred(size_t which) {
  auto action = std::move(running->deferred[which]);
  running->deferred.erase(running->deferred.begin() + static_cast<std::ptrdiff_t>(which));
  action();
  ++running->events;
}

std::string stuck() {
  std::ostringstream out;
  out << running->name << ": nothing can go on:";
  int shown = 0;
  for (const Fibre& fibre : running->fibres)
    if (!fibre.finished && fibre.index % kWarp == 0 && shown++ < 24)
      out << " thread block " << fibre.thread_block->index << " thread " << fibre.index << " waits for "
          << (fibre.waiting_for ? fibre.waiting_for : "?") << ";";
  return out.str();
}

void prepare(ThreadBlock& thread_block, int64_t index, int rank) {
  const Grid& grid = running->grid;
  thread_block.index = index;
  thread_block.rank = rank;
  // 0xff is NaN in every element type. What lies behind the end of shared memory is checked when the thread block ends.
  const size_t size = static_cast<size_t>(grid.shared_bytes) + 2 * kSharedAlignment;
  thread_block.storage.assign(size, 0xff);
  thread_block.async_storage.assign(size, 0xff);
  const auto align = [](unsigned char* p) {
    return p + (kSharedAlignment - reinterpret_cast<uintptr_t>(p) % kSharedAlignment) % kSharedAlignment;
  };
  thread_block.shared = align(thread_block.storage.data());
  thread_block.async_view = align(thread_block.async_storage.data());
  thread_block.warps.assign(static_cast<size_t>((grid.threads + kWarp - 1) / kWarp), {});
  thread_block.warpgroups.assign(static_cast<size_t>((grid.threads + kWarpgroup - 1) / kWarpgroup), {});
  for (Barrier& barrier : thread_block.named) barrier = {};
}

void check_guard(const ThreadBlock& thread_block) {
  for (size_t i = 0; i < kSharedAlignment; ++i)
    if (thread_block.shared[running->grid.shared_bytes + static_cast<int64_t>(i)] != 0xff)
      throw std::runtime_error("emulator: " + running->name + ": a write behind the end of shared memory");
}

void run_cluster(int64_t first) {
  const Grid& grid = running->grid;
  for (int rank = 0; rank < grid.cluster; ++rank)
    prepare(running->thread_blocks[static_cast<size_t>(rank)], first + rank, rank);
  running->cluster = {};
  const size_t count = running->fibres.size();
  for (size_t i = 0; i < count; ++i) {
    Fibre& fibre = running->fibres[i];
    fibre = Fibre{};
    fibre.thread_block = &running->thread_blocks[i / static_cast<size_t>(grid.threads)];
    fibre.index = static_cast<int>(i % static_cast<size_t>(grid.threads));
    fibre.stack = stacks.get(i);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
  }
  std::vector<size_t> warps;
  for (size_t i = 0; i < count; i += kWarp) warps.push_back(i);
  std::vector<bool> held(warps.size());
  bool any_held = false;
  size_t left = count;
  while (left) {
    const int64_t before = running->events;
    std::shuffle(warps.begin(), warps.end(), generator);
    // Now and then some warps are held until no other warp can go on. A warp that is late in reading what another may
    // already overwrite is found in this way.
    if (generator() % 32 == 0)
      for (size_t i = 0; i < held.size(); ++i) any_held |= held[i] = generator() % 4 == 0;
    for (const size_t warp : warps) {
      if (held[warp / kWarp]) continue;
      // A thread block may have fewer threads than a warp.
      for (size_t i = warp; i < std::min(warp + kWarp, count); ++i) {
        Fibre& fibre = running->fibres[i];
        if (fibre.finished) continue;
        resume(fibre);
        if (running->error) std::rethrow_exception(running->error);
        if (fibre.finished) --left;
      }
      while (!running->deferred.empty() && coin()) run_deferred(generator() % running->deferred.size());
    }
    if (running->events == before && left) {
      if (any_held) {
        held.assign(held.size(), false);
        any_held = false;
        continue;
      }
      if (running->deferred.empty()) throw std::runtime_error("emulator: " + stuck());
      run_deferred(generator() % running->deferred.size());
    }
  }
  // A copy or a product that nobody waited for would happen after the end of the thread block.
  if (!running->deferred.empty())
    throw std::runtime_error("emulator: " + running->name + ": a thread block ended with asynchronous work under way");
  const auto check = [](const std::shared_ptr<State>& state) {
    if (state && state->unfinished())
      throw std::runtime_error("emulator: " + running->name + ": a thread ended with " + state->unfinished());
  };
  for (const Fibre& fibre : running->fibres) check(fibre.state);
  for (const ThreadBlock& thread_block : running->thread_blocks) {
    for (const Meeting& warpgroup : thread_block.warpgroups) check(warpgroup.state);
    check_guard(thread_block);
  }
}

void arrive(Barrier& barrier, int expected, const char* what) {
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected) fail(std::string(what) + ": threads disagree on how many take part");
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++running->events;
    return;
  }
  const int64_t generation = barrier.generation;
  wait_until([&] { return barrier.generation != generation; }, what);
}

}  // namespace

void fail(const std::string& what) { throw std::runtime_error("emulator: " + place() + ": " + what); }

void set_seed(uint64_t seed) { generator.seed(seed); }
void set_shared_limit(int64_t bytes) { shared_limit = bytes; }
bool coin() { return generator() & 1; }
void happened() { ++running->events; }
void later(std::function<void()> action) { running->deferred.push_back(std::move(action)); }

void run(const Grid& grid, const std::string& name, const std::function<void()>& kernel) {
  if (running) throw std::runtime_error("emulator: a kernel started from a kernel");
  if (grid.cluster < 1 || grid.thread_blocks % grid.cluster)
    throw std::runtime_error("emulator: " + name + ": the thread blocks are no multiple of the cluster");
  if (grid.threads < 1 || grid.threads > 1024) throw std::runtime_error("emulator: " + name + ": 1 to 1024 threads");
  if (grid.shared_bytes > shared_limit)
    throw std::runtime_error("emulator: " + name + ": this GPU gives a thread block " + std::to_string(shared_limit) +
                             " bytes of shared memory");
  Run state;
  state.grid = grid;
  state.name = name;
  state.kernel = &kernel;
  state.thread_blocks.resize(static_cast<size_t>(grid.cluster));
  state.fibres.resize(static_cast<size_t>(grid.cluster) * static_cast<size_t>(grid.threads));
  running = &state;
  try {
    for (int64_t first = 0; first < grid.thread_blocks; first += grid.cluster) run_cluster(first);
  } catch (...) {
    running = nullptr;
    throw;
  }
  running = nullptr;
}

int warp_lanes() { return std::min(kWarp, running->grid.threads - current->index / kWarp * kWarp); }
int thread_index() { return current->index; }
int64_t thread_block_index() { return current->thread_block->index; }
int64_t thread_block_count() { return running->grid.thread_blocks; }
unsigned char* shared_memory() { return current->thread_block->shared; }
int64_t shared_bytes() { return running->grid.shared_bytes; }
int cluster_size() { return running->grid.cluster; }
int cluster_rank() { return current->thread_block->rank; }
unsigned char* shared_memory_of(int rank) { return running->thread_blocks.at(static_cast<size_t>(rank)).shared; }
unsigned char* async_view_of(int rank) { return running->thread_blocks.at(static_cast<size_t>(rank)).async_view; }
std::shared_ptr<State>& thread_state() { return current->state; }
std::shared_ptr<State>& warpgroup_state() {
  return current->thread_block->warpgroups[static_cast<size_t>(current->index / kWarpgroup)].state;
}
void publish_to_async_view() {
  ThreadBlock& thread_block = *current->thread_block;
  std::memcpy(thread_block.async_view, thread_block.shared, static_cast<size_t>(running->grid.shared_bytes));
}

uint32_t shared_address(const void* pointer) {
  const int64_t offset = static_cast<const unsigned char*>(pointer) - current->thread_block->shared;
  if (offset < 0 || offset > running->grid.shared_bytes) fail("the address of something outside shared memory");
  return static_cast<uint32_t>(offset);
}

void wait_until(const std::function<bool()>& done, const char* what) {
  current->waiting_for = what;
  while (!done()) yield();
  current->waiting_for = nullptr;
}

void meet(int lanes, const char* what, void* argument, const std::function<void(void**)>& action) {
  ThreadBlock& thread_block = *current->thread_block;
  Meeting& meeting = lanes == kWarp ? thread_block.warps[static_cast<size_t>(current->index / kWarp)]
                                    : thread_block.warpgroups[static_cast<size_t>(current->index / kWarpgroup)];
  const int expected = lanes == kWarp ? warp_lanes() : lanes;
  if (meeting.arrived == 0) meeting.what = what;
  if (std::strcmp(meeting.what, what) != 0)
    fail(std::string("the threads of a warp diverge: ") + meeting.what + " and " + what);
  meeting.arguments[current->index % lanes] = argument;
  if (++meeting.arrived == expected) {
    action(meeting.arguments);
    meeting.arrived = 0;
    ++meeting.generation;
    ++running->events;
    return;
  }
  const int64_t generation = meeting.generation;
  wait_until([&] { return meeting.generation != generation; }, what);
}

void sync_thread_block() { arrive(current->thread_block->named[0], running->grid.threads, "sync_thread_block"); }
void sync_named(int id, int threads) {
  if (id < 1 || id >= kNamedBarriers) fail("a named barrier has a number from 1 to 15");
  if (threads % kWarp) fail("a named barrier takes whole warps");
  arrive(current->thread_block->named[id], threads, "sync_named");
}
void sync_cluster() { arrive(running->cluster, running->grid.cluster * running->grid.threads, "sync_cluster"); }
void sync_warp() {
  meet(kWarp, "sync_warp", nullptr, [](void**) {});
}

}  // namespace riformer::emulator
