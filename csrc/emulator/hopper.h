// The instructions of sm_90a on the emulator; csrc/cuda/hopper.h says what each of them does.
//
// The copy engine and wgmma see a second copy of shared memory, the async view. Ordinary stores reach it at a fence
// only, so a kernel that forgets fence.proxy.async computes with NaN. Products run at their commit or at the wait for
// them.
#pragma once

#include <cstdint>

#include "emulator.h"

namespace riformer::emulator {

// A row-major matrix and the box that one copy takes of it.
struct TensorMap {
  const void* base;
  int64_t columns, rows;
  int element_bytes, box_columns, box_rows;

  int box_row_bytes() const { return element_bytes * box_columns; }  // also the width of the swizzle
};

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive_at(uint64_t* barrier, int rank);
void barrier_arrive_expect(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity);
// Into every thread block of the cluster whose rank is a bit of `ranks`.
void copy_box(void* shared, const TensorMap& map, uint64_t* barrier, int column, int row, unsigned ranks);

void product_fence();
void product_commit();
void product_wait(int pending);
// `a`: four registers, or null if `a` is in shared memory and has a descriptor.
void product(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool add, DType dtype);

}  // namespace riformer::emulator
