// The errors of CUDA's functions, as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace riformer::cuda {

// `what()` returns a text that says what failed. It is called only on a failure, so that a launch that succeeds does
// not compose a text.
template <class What>
void check(cudaError_t status, const What& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forgets the error, which the next launch would report again otherwise
  throw std::runtime_error("riformer: " + std::string(what()) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

}  // namespace riformer::cuda
