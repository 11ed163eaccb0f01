// The sm_90a instructions on the emulator; see csrc/cuda/hopper.h for what each does.
//
// The copy engine and wgmma see a second copy of shared memory, into which ordinary stores go at a fence only: a kernel
// that forgets fence.proxy.async computes with NaN. Products run at their commit or at the wait for them.
#pragma once

#include <cstdint>

#include "emulator.h"

namespace riformer::emulator {

// A row-major matrix of 16-bit values and the box that one copy takes of it.
struct TensorMap {
  const void* base;
  int64_t columns, rows, row_bytes;
  int box_columns, box_rows;
  int swizzle;  // bytes of a row of the box
};

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive_at(uint64_t* barrier, int rank);
void barrier_arrive_expect(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity);
void copy_box(void* shared, const TensorMap& map, uint64_t* barrier, int column, int row, unsigned blocks);

void product_fence();
void product_commit();
void product_wait(int pending);
// `a`: four registers, or null for a descriptor.
void product(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool add, bool is_bf16);

}  // namespace riformer::emulator
