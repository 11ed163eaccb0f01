// The instructions that sm_90a adds: barriers that count bytes, the tensor copy engine, warpgroup products, clusters.
// Same two forms as device.h. Names and layouts follow the PTX manual (sections on mbarrier, cp.async.bulk.tensor,
// wgmma).
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

constexpr int kWarpgroup = 128;

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

RIFORMER_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Initialised barriers become visible to the copy engine and to the cluster.
RIFORMER_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
RIFORMER_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the same barrier of block `rank` of the cluster.
RIFORMER_DEVICE void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// One arrival, and `bytes` more to come through the copy engine before the phase ends.
RIFORMER_DEVICE void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended. Acquires within the block, as CUTLASS does: for the whole cluster it would
// invalidate the L1 cache each time, and what is waited for comes through the copy engine.
RIFORMER_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A box of a matrix, whose size is in `map`, from (column, row) on into shared memory; zeros beyond the matrix.
RIFORMER_DEVICE void copy_box(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same into every block of the cluster whose bit is set in `blocks`, at the same place, reported to their barriers.
RIFORMER_DEVICE void copy_box_to(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row,
                                 uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// What this thread stored in shared memory becomes visible to the copy engine and to wgmma; before the barrier.
RIFORMER_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

RIFORMER_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
RIFORMER_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Registers per thread of the warpgroup from here on.
template <int Count>
RIFORMER_DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
RIFORMER_DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

RIFORMER_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RIFORMER_DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
RIFORMER_DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// The compiler must not move a use of the sums above the wait for them.
template <int Count>
RIFORMER_DEVICE void keep_after_wait(float (&d)[Count]) {
  RIFORMER_UNROLL
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (64 x N) = or += a b^T over 16 k. Both matrices from shared memory, by descriptor; or a from registers. Thread t
// holds rows 16 (t / 32) + t % 32 / 4 (d[4 j], d[4 j + 1]) and 8 below (d[4 j + 2], d[4 j + 3]), columns
// 8 j + 2 (t % 4) and the next; of a: as in multiply_16x8x16.
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
                                 uint16_t blocks) {
  emulator::copy_box(shared, *map, barrier, column, row, blocks);
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
  emulator::product(d, N, nullptr, a, b, add, std::is_same<T, bf16>::value);
}
template <class T, int N>
RIFORMER_DEVICE void product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulator::product(d, N, a, 0, b, add, std::is_same<T, bf16>::value);
}

#endif

// Rows of `Bytes` (128 or 64) in shared memory, as the copy engine writes them and wgmma reads them: the 16-byte pieces
// of a row change places with the row's number, so that eight rows below each other lie in different banks.
template <int Bytes>
RIFORMER_HOST_DEVICE int swizzled(int offset) {
  static_assert(Bytes == 128 || Bytes == 64, "one of the two swizzles in use");
  return offset ^ (Bytes == 128 ? (offset >> 3 & 0x70) : (offset >> 3 & 0x30));
}

// Descriptor of a matrix with k along its rows of `Bytes`, swizzled as above, eight-row groups one behind the other.
// The next 16 k are 32 bytes further.
template <int Bytes>
RIFORMER_DEVICE uint64_t descriptor_at(int address) {
  constexpr uint64_t kGroup = 8 * Bytes / 16, kSwizzle = Bytes == 128 ? 1 : 2;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | kGroup << 32 | kSwizzle << 62;
}
template <int Bytes>
RIFORMER_DEVICE uint64_t descriptor(const void* shared) {
  return descriptor_at<Bytes>(static_cast<int>(shared_address(shared)));
}
RIFORMER_DEVICE uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace riformer::cuda
