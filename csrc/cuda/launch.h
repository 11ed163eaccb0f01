// How a kernel is started: on a CUDA stream, or on the emulator. Every failure is raised with the configuration in it.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "device.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include "check.h"
#endif

namespace riformer::cuda {

constexpr int64_t kMostBlocks = 2147483647;  // of a grid in its first direction (CUDA programming guide)

// What a launch needs beside its arguments. `stream` is a cudaStream_t.
struct Launch {
  const char* kernel;
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
  void* stream = nullptr;

  std::string text() const {
    std::ostringstream out;
    out << kernel << " with " << blocks << " blocks of " << threads << " threads, " << shared_bytes
        << " bytes of shared memory, clusters of " << cluster;
    return out.str();
  }
};

// Whether there is anything to start; an error where there is too much.
inline bool has_blocks(const Launch& how) {
  if (how.blocks > kMostBlocks)
    throw std::runtime_error("riformer: " + how.text() + ": a launch takes at most " + std::to_string(kMostBlocks) +
                             " blocks; split the batch");
  return how.blocks > 0;
}

#if defined(__CUDACC__)

template <class Args>
void launch(void (*kernel)(Args), const Launch& how, const Args& args) {
  if (!has_blocks(how)) return;
  if (how.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(how.shared_bytes)),
          [&] { return how.text(); });
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute attribute{};
  if (how.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(how.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, args), [&] { return how.text(); });
}

#else

template <class Args>
void launch(void (*kernel)(Args), const Launch& how, const Args& args) {
  if (!has_blocks(how)) return;
  emulator::run({how.blocks, how.cluster, how.threads, how.shared_bytes}, how.text(), [&] { kernel(args); });
}

#endif

}  // namespace riformer::cuda
