// Many host threads allow kernels shared memory on two GPUs at once. The functions of the CUDA runtime are stand-ins
// (runtime_stand_in.cpp): what counts is how often they are asked, and for how much.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "launch.h"

extern std::atomic<int> calls, wrong;
extern thread_local int device;

int main() {
  static const char kernels[3] = {};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([i] {
      device = i % 2;
      for (int call = 0; call < 3000; ++call) {
        const riformer::cuda::Launch how{"a kernel", 1, 128, 50000 + 1000 * (call % 100)};
        riformer::cuda::allow_shared_memory(kernels + call % 3, how);
      }
    });
  for (std::thread& thread : threads) thread.join();
  std::printf("%d calls, %d wrong\n", calls.load(), wrong.load());
}
