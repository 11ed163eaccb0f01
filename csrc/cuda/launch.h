// How a kernel is started: on a CUDA stream, or on the emulator. Every failure is raised with the configuration in it.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "device.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
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

#if defined(__CUDACC__)

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this one's error again
  throw std::runtime_error("riformer: " + what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

template <class Args>
void launch(void (*kernel)(Args), const Launch& how, const Args& args) {
  if (how.blocks <= 0) return;
  if (how.blocks > kMostBlocks)
    throw std::runtime_error("riformer: " + how.text() + ": a launch takes at most 2147483647 blocks; split the batch");
  if (how.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(how.shared_bytes)),
          how.text());
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
  check(cudaLaunchKernelEx(&config, kernel, args), how.text());
}

#else

template <class Args>
void launch(void (*kernel)(Args), const Launch& how, const Args& args) {
  if (how.blocks <= 0) return;
  if (how.blocks > kMostBlocks)
    throw std::runtime_error("riformer: " + how.text() + ": a launch takes at most 2147483647 blocks; split the batch");
  emulator::run({how.blocks, how.cluster, how.threads, how.shared_bytes}, how.text(), [&] { kernel(args); });
}

#endif

}  // namespace riformer::cuda
