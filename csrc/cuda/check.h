// CUDA's errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace riformer::cuda {

// `what()` says what failed; it is asked only then, as this stands on the way of every launch.
template <class What>
void check(cudaError_t status, const What& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this one's error again
  throw std::runtime_error("riformer: " + std::string(what()) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

}  // namespace riformer::cuda
