// The instructions that sm_90a adds: barriers that count bytes (PTX: mbarrier), the tensor copy engine
// (cp.async.bulk.tensor), products by a whole warpgroup (wgmma), and clusters of thread blocks that reach each other's
// shared memory. As in device.h, each has a form for nvcc and one for the emulator.
#pragma once

#include <cstdint>

#include "device.h"

#if defined(__CUDACC__)
#include <cuda.h>

#include "wgmma.h"
#else
#include "../emulator/hopper.h"
#endif

namespace riformer::cuda {

constexpr int kWarpgroup = 128;  // threads

// What one wgmma takes of each row of its operands: 32 bytes, which are 16 elements of 16 bits.
constexpr int kProductBytes = 32;
template <class T>
constexpr int kProductDepth = kProductBytes / kElementBytes<T>;

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

RIFORMER_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes the barriers that this thread initialised visible to the copy engine and to the other thread blocks of the
// cluster.
RIFORMER_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
RIFORMER_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives at the barrier that lies at the same place in the shared memory of thread block `rank` of the cluster.
RIFORMER_DEVICE void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Arrives, and lets the phase end only after the copy engine has written `bytes` more.
RIFORMER_DEVICE void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended. The wait acquires for the thread block and not for the cluster, as
// CUTLASS does: an acquire for the cluster would invalidate the L1 cache every time, and here only copies of the copy
// engine are waited for.
RIFORMER_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Starts the copy of a box of a matrix to shared memory. `map` has the size of the box, (column, row) is its first
// element. Elements outside the matrix become zeros. `barrier` counts the bytes that have arrived.
RIFORMER_DEVICE void copy_box(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same into every thread block of the cluster whose rank is a bit of `ranks`. In each of them the box lies at the
// same place, and the barrier at the same place counts it.
RIFORMER_DEVICE void copy_box_to(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row,
                                 uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(ranks)
      : "memory");
}

// Makes what this thread stored in shared memory visible to the copy engine and to wgmma. It belongs before the barrier
// that tells other threads of the stores.
RIFORMER_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

RIFORMER_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
RIFORMER_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// From here on each thread of the warpgroup has `Count` registers: more than before, or fewer.
template <int Count>
RIFORMER_DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
RIFORMER_DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// Products are asynchronous. product_fence comes before the first product of a group, which may then read registers
// that were written before; product_commit ends the group; product_wait waits until at most `Pending` groups are under
// way.
RIFORMER_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RIFORMER_DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
RIFORMER_DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving a use of the sums above the wait for them.
template <int Count>
RIFORMER_DEVICE void keep_after_wait(float (&d)[Count]) {
  RIFORMER_UNROLL
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Starts d = a b^T, or with `add` d += a b^T, over one kProductDepth of k: d is 64 x N, `b` has N rows. `b` is in
// shared memory and is given by its descriptor; `a` is either in shared memory too, or in registers. Thread t of the
// warpgroup holds rows r = 16 (t / 32) + t % 32 / 4 and r + 8 of d, and of every eight columns c = 8 j + 2 (t % 4) and
// c + 1: d[4 j] and d[4 j + 1] in row r, d[4 j + 2] and d[4 j + 3] in row r + 8 (PTX manual, "Register Fragments for
// wgmma"). An `a` in registers is held as multiply_16x8x16 (device.h) holds it, by each warp for its 16 rows.
template <class T, int N>
RIFORMER_DEVICE void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  Wgmma<T, N>::shared(d, a, b, add);
}
template <class T, int N>
RIFORMER_DEVICE void product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  Wgmma<T, N>::registers(d, a, b, add);
}

#else

using TensorMap = emulator::TensorMap;

RIFORMER_DEVICE void barrier_init(uint64_t* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
RIFORMER_DEVICE void barrier_init_fence() {}
RIFORMER_DEVICE void barrier_arrive(uint64_t* barrier) {
  emulator::barrier_arrive_at(barrier, emulator::cluster_rank());
}
RIFORMER_DEVICE void barrier_arrive_at(uint64_t* barrier, int rank) { emulator::barrier_arrive_at(barrier, rank); }
RIFORMER_DEVICE void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  emulator::barrier_arrive_expect(barrier, bytes);
}
RIFORMER_DEVICE void barrier_wait(uint64_t* barrier, int parity) { emulator::barrier_wait(barrier, parity); }
RIFORMER_DEVICE void copy_box(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row) {
  emulator::copy_box(shared, *map, barrier, column, row, 1u << emulator::cluster_rank());
}
RIFORMER_DEVICE void copy_box_to(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row,
                                 uint16_t ranks) {
  emulator::copy_box(shared, *map, barrier, column, row, ranks);
}
RIFORMER_DEVICE void fence_async() { emulator::publish_to_async_view(); }
RIFORMER_DEVICE int cluster_rank() { return emulator::cluster_rank(); }
RIFORMER_DEVICE void sync_cluster() { emulator::sync_cluster(); }
template <int Count>
RIFORMER_DEVICE void registers_up() {}
template <int Count>
RIFORMER_DEVICE void registers_down() {}
RIFORMER_DEVICE void product_fence() { emulator::product_fence(); }
RIFORMER_DEVICE void product_commit() { emulator::product_commit(); }
template <int Pending>
RIFORMER_DEVICE void product_wait() {
  emulator::product_wait(Pending);
}
template <int Count>
RIFORMER_DEVICE void keep_after_wait(float (&)[Count]) {}
template <class T, int N>
RIFORMER_DEVICE void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  emulator::product(d, N, nullptr, a, b, add, ElementTraits<T>::kDType);
}
template <class T, int N>
RIFORMER_DEVICE void product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulator::product(d, N, a, 0, b, add, ElementTraits<T>::kDType);
}

#endif

// The swizzle of rows of `Bytes` (128 or 64) in shared memory, in which the copy engine writes and wgmma reads: the
// pieces of a row are exchanged depending on the row's number, so that the same piece of eight consecutive rows lies in
// eight different groups of banks.
template <int Bytes>
RIFORMER_HOST_DEVICE int swizzled(int offset) {
  static_assert(Bytes == 128 || Bytes == 64, "one of the two swizzles in use");
  return offset ^ (Bytes == 128 ? (offset >> 3 & 0x70) : (offset >> 3 & 0x30));
}

// The descriptor of a matrix in shared memory for wgmma (PTX manual, "Matrix Descriptor Format"). k runs along the
// rows, which have `Bytes` and are swizzled as above; groups of eight rows follow each other directly.
template <int Bytes>
RIFORMER_DEVICE uint64_t descriptor_at(int address) {
  constexpr uint64_t kGroup = 8 * Bytes / 16, kSwizzle = Bytes == 128 ? 1 : 2;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | kGroup << 32 | kSwizzle << 62;
}
template <int Bytes>
RIFORMER_DEVICE uint64_t descriptor(const void* shared) {
  return descriptor_at<Bytes>(static_cast<int>(shared_address(shared)));
}
// The descriptor of what lies `bytes` further. The next kProductDepth of k lies kProductBytes further.
RIFORMER_DEVICE uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace riformer::cuda
