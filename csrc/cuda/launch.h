// How a kernel is started: on a CUDA stream, or on the emulator. Every failure is raised with the configuration in it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "device.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#include "check.h"
#endif

namespace riformer::cuda {

constexpr int64_t kMostThreadBlocks = 2147483647;  // of a grid in its first direction (CUDA programming guide)

// Fails by name on a dtype that the CUDA kernels do not serve. Launchers call it for every dtype that a kernel looks at
// itself.
inline void check_dtypes(std::initializer_list<DType> dtypes) {
  for (const DType dtype : dtypes) with_served_dtype(dtype, [](auto) {});
}

// with_served_dtype for kernels that have a form for 16-bit elements only: `kernels` names them in the error for any
// other.
template <class F>
void with_16_bit_dtype(DType dtype, const char* kernels, const F& f) {
  with_served_dtype(dtype, [&](auto element) {
    if constexpr (sizeof(element) == 2)
      f(element);
    else
      throw std::logic_error(std::string("riformer: ") + kernels + " compute with 16-bit elements, not with " +
                             ElementTraits<decltype(element)>::kName);
  });
}

// What a launch needs beside its arguments. `stream` is a cudaStream_t.
struct Launch {
  const char* kernel;
  int64_t thread_blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
  void* stream = nullptr;

  std::string text() const {
    std::ostringstream out;
    out << kernel << " with " << thread_blocks << " thread blocks of " << threads << " threads, " << shared_bytes
        << " bytes of shared memory, clusters of " << cluster;
    return out.str();
  }
};

// Whether there is anything to start. Fails if there are more thread blocks than a launch takes.
inline bool has_thread_blocks(const Launch& how) {
  if (how.thread_blocks > kMostThreadBlocks)
    throw std::runtime_error("riformer: " + how.text() + ": a launch takes at most " +
                             std::to_string(kMostThreadBlocks) + " thread blocks; split the batch");
  return how.thread_blocks > 0;
}

#if defined(__CUDACC__)

// A kernel may use more than 48 KiB of shared memory only after this. It is done once for each kernel and GPU, and for
// as much as the GPU gives: if each launch set its own size, launches by several host threads would race.
inline void allow_shared_memory(const void* kernel, const Launch& how) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0, most = 0;
  const auto what = [&] { return how.text(); };
  check(cudaGetDevice(&device), what);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, kernel})) return;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
  allowed.insert({device, kernel});
}

template <class Args>
void launch(void (*kernel)(Args), const Launch& how, const Args& args) {
  if (!has_thread_blocks(how)) return;
  if (how.shared_bytes > 48 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel), how);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(how.thread_blocks));
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
  if (!has_thread_blocks(how)) return;
  emulator::run({how.thread_blocks, how.cluster, how.threads, how.shared_bytes}, how.text(), [&] { kernel(args); });
}

#endif

}  // namespace riformer::cuda
