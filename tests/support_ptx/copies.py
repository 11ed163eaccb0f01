"""Asynchronous copies and the barriers in shared memory that count them.

cp.async writes either at once or when it is waited for, at random. A tensor copy is an event of the cluster: it reads
and writes at a random moment, and then reports its bytes to the barrier.
"""

from __future__ import annotations

import numpy as np

from .memory import GLOBAL_BASE, PtxError, SharedMemory
from .tensor_map import TensorMap


class MBarrier:
    def __init__(self, count: int):
        self.count = self.pending = count
        self.transactions = 0
        self.phase = 0

    def settle(self, cluster):
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
        cluster.progress += 1

    def expect(self, amount: int):
        self.transactions += amount
        if abs(self.transactions) >= 1 << 20:
            raise PtxError(f"transaction count {self.transactions}")


class Copies:
    """The part of a warp that copies."""

    def init_copies(self):
        self.open_copies, self.copy_groups = [], []
        self.open_bulk, self.bulk_groups = [], []

    # cp.async

    def copy_async(self, to, source, size, source_size, mask, only_16):
        if only_16 and size != 16:
            raise PtxError("cp.async.cg of other than 16 bytes")
        lanes = np.arange(32) if mask is None else np.flatnonzero(mask)
        counts = np.full(32, size) if source_size is None else source_size.astype(np.int64)
        if (counts[lanes] > size).any():
            raise PtxError("cp.async of more bytes than it writes")
        if (to[lanes] % size).any() or (source[lanes] % size).any():
            raise PtxError("cp.async of a misaligned address")
        shared, memory = self.cta.shared, self.launch.memory
        shared.check(to[lanes], size)
        read = lanes[counts[lanes] > 0]
        if read.size:
            memory.check(source[read] - GLOBAL_BASE, 1)
            memory.check(source[read] - GLOBAL_BASE + counts[read] - 1, 1)
        to, source, counts = to[lanes], source[lanes] - GLOBAL_BASE, counts[lanes]
        shared.check_unread(to, "cp.async")

        places, sources = (start[:, None] + np.arange(size) for start in (to, source))
        inside = np.arange(size) < counts[:, None]

        def perform():
            shared.bytes[places] = np.where(inside, memory.bytes[np.where(inside, sources, 0)], 0)
            self.note_store(shared, places)

        if self.launch.random.random() < 0.5:
            perform()
        else:
            shared.bytes[places] = 0xFF  # until then it holds what nobody may use
            self.open_copies.append(perform)

    def copy_commit(self, mask):
        self.copy_groups.append(self.open_copies)
        self.open_copies = []

    def copy_wait(self, pending, mask, everything=False):
        if everything:
            self.copy_commit(mask)
        while len(self.copy_groups) > pending:
            for perform in self.copy_groups.pop(0):
                perform()

    def pending_problem(self):
        if self.open_copies or any(self.copy_groups):
            return "copies that were never waited for"
        return self.wgmma_problem()

    def finish(self):
        for copies in [*self.copy_groups, self.open_copies]:
            for perform in copies:
                perform()  # they land, after all, whatever lies there now
        unfinished = self.open_copies or any(self.copy_groups)
        self.copy_groups, self.open_copies = [], []
        for store in [s for g in self.bulk_groups for s in g] + self.open_bulk:
            store()
        self.open_bulk, self.bulk_groups = [], []
        if unfinished:
            raise PtxError("a warp ended with cp.async copies that it did not wait for")

    # mbarrier

    def one(self, at, mask, what):
        """The address of the single lane, or of all lanes one after the other."""
        lanes = np.arange(32) if mask is None else np.flatnonzero(mask)
        return [int(at[lane]) for lane in lanes], lanes

    def mbarrier(self, address, space):
        cta, at = self.cta, address
        if space == "cluster" and address >> 24:
            cta, at = self.cluster.ctas[(address >> 24) - 1], address & 0xFFFFFF
        if at not in cta.mbarriers:
            raise PtxError(f"no barrier at shared {at:#x}")
        return cta.mbarriers[at]

    def mbarrier_init(self, at, count, mask):
        addresses, lanes = self.one(at, mask, "mbarrier.init")
        for address, lane in zip(addresses, lanes, strict=True):
            if address % 8 or not 0 < count[lane] < 1 << 20:
                raise PtxError(f"mbarrier.init at {address:#x} of {count[lane]}")
            self.cta.shared.check(np.array([address]), 8)
            if address in self.cta.mbarriers:
                raise PtxError("mbarrier.init of a barrier in use")
            self.cta.mbarriers[address] = MBarrier(int(count[lane]))

    def mbarrier_inval(self, at, mask):
        for address in self.one(at, mask, "inval")[0]:
            self.mbarrier(address, "shared")
            del self.cta.mbarriers[address]

    def mbarrier_expect(self, at, amount, space, mask):
        for address, lane in zip(*self.one(at, mask, "expect_tx"), strict=True):
            self.mbarrier(address, space).expect(int(amount[lane]))

    def mbarrier_arrive(self, at, amount, expect, space, mask):
        states = np.zeros(32, np.uint64)
        for address, lane in zip(*self.one(at, mask, "arrive"), strict=True):
            barrier = self.mbarrier(address, space)
            states[lane] = barrier.phase
            count = 1
            if expect:
                barrier.expect(int(amount[lane]))
            elif amount is not None:
                count = int(amount[lane])
            barrier.pending -= count
            if barrier.pending < 0:
                raise PtxError(f"more arrivals at the barrier at {address:#x} than it counts ({barrier.count})")
            barrier.settle(self.cluster)
        return states

    def mbarrier_test(self, at, state, parity, may_wait, mask):
        """Per lane whether its phase has ended; None: wait for it."""
        out = np.zeros(32, bool)
        for address, lane in zip(*self.one(at, mask, "wait"), strict=True):
            barrier = self.mbarrier(address, "shared")
            if parity:
                if state[lane] > 1:
                    raise PtxError(f"parity {state[lane]}")
                out[lane] = barrier.phase % 2 != state[lane]
            else:
                out[lane] = barrier.phase != state[lane]
        lanes = slice(None) if mask is None else mask
        if out[lanes].all():
            return out
        # try_wait may also give up; then the program asks again.
        if self.launch.random.random() < 0.05:
            return out
        return None

    # Tensor copies.

    def tensor_map_at(self, address):
        if address % 64:
            raise PtxError(f"tensor map at {address:#x}, which is not 64-byte aligned")
        memory, offset = self.memory_of("generic", np.array([address]))
        raw = memory.raw(int(offset[0]), 128).tobytes()
        return TensorMap.unpack(raw)

    def tensor_load(self, to, source, coordinates, barrier, blocks, mask):
        lanes = np.arange(32) if mask is None else np.flatnonzero(mask)
        for lane in lanes:
            tensor = self.tensor_map_at(int(source[lane]))
            where = [int(c[lane]) for c in coordinates]
            if len(where) != len(tensor.dims):
                raise PtxError(f"{len(where)} coordinates for a map of {len(tensor.dims)} dimensions")
            targets = [(self.cta, int(to[lane]), int(barrier[lane]))]
            if blocks is not None:
                bits = int(blocks[lane])
                if bits >> self.launch.cluster_size or not bits:
                    raise PtxError(f"multicast to thread blocks {bits:#b} of a cluster of {self.launch.cluster_size}")
                low, at = int(to[lane]) & 0xFFFFFF, int(barrier[lane]) & 0xFFFFFF
                targets = [(c, low, at) for i, c in enumerate(self.cluster.ctas) if bits >> i & 1]
            for cta, address, at in targets:
                if address >> 24:
                    cta, address = self.cluster.ctas[(address >> 24) - 1], address & 0xFFFFFF
                if address % 128:
                    raise PtxError(f"tensor copy to shared {address:#x}, which is not 128-byte aligned")
                if (at & 0xFFFFFF) not in cta.mbarriers:
                    raise PtxError(f"tensor copy reports to shared {at:#x}, where no barrier is")
                self.schedule_load(tensor, where, cta, address, cta.mbarriers[at & 0xFFFFFF])
        self.cluster.progress += 1

    def schedule_load(self, tensor, where, cta, address, barrier):
        cluster, memory, shared = self.cluster, self.launch.memory, cta.shared
        offsets = tensor.smem_offsets(address).reshape(-1)
        shared.check(offsets, tensor.size)
        unit = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}[tensor.size]
        fenced = self.last_fence if cta is self.cta else 0
        shared.check_unread(offsets, "a tensor copy")

        def land():
            source, inside = tensor.global_offsets(where)
            values = np.zeros(inside.shape, unit)
            if tensor.nan_fill:
                values[...] = -1
            if inside.any():
                values[inside] = memory.load(source[inside] - GLOBAL_BASE, unit, 1)[0]
            touched = shared.unfenced[offsets] * (shared.stamp[offsets] > fenced)
            if touched.any():
                raise PtxError(
                    f"a tensor copy writes over {np.count_nonzero(touched)} elements at shared {address:#x} that warp "
                    f"{int(touched.max()) - 1} of thread block {cta.index} stored without a proxy fence"
                )
            shared.check_unread(offsets, "a tensor copy")
            shared.store(offsets, unit, [values.reshape(-1)])
            barrier.transactions -= offsets.size * tensor.size
            if barrier.transactions < -(1 << 20):
                raise PtxError("transaction count out of range")
            if barrier.pending == 0 or barrier.transactions == 0:
                barrier.settle(cluster)

        cluster.events.append(land)

    def tensor_store(self, source, target, coordinates, mask):
        lanes = np.arange(32) if mask is None else np.flatnonzero(mask)
        for lane in lanes:
            tensor = self.tensor_map_at(int(target[lane]))
            where, address = [int(c[lane]) for c in coordinates], int(source[lane])
            if address % 128:
                raise PtxError("tensor store from a misaligned address")
            offsets = tensor.smem_offsets(address).reshape(-1)
            unit = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}[tensor.size]

            def write(tensor=tensor, where=where, offsets=offsets, unit=unit):
                self.check_fenced(offsets, "tensor store")
                values = self.cta.shared.load(offsets, unit, 1)[0]
                to, inside = tensor.global_offsets(where)
                self.launch.memory.store(to[inside] - GLOBAL_BASE, unit, [values.reshape(inside.shape)[inside]])

            if self.launch.random.random() < 0.5:
                write()
            else:
                self.open_bulk.append(write)

    def bulk_commit(self, mask):
        self.bulk_groups.append(self.open_bulk)
        self.open_bulk = []

    def bulk_wait(self, pending, mask):
        while len(self.bulk_groups) > pending:
            for write in self.bulk_groups.pop(0):
                write()

    # The proxy of tensor copies and of wgmma.

    def note_store(self, shared, places):
        """That this warp stored to these bytes, which the asynchronous proxy does not see before a fence. cp.async is
        a store like others in this (PTX ISA, "async proxy": only the bulk copies belong to it)."""
        if self.launch.check_proxy:
            self.cta.clock += 1
            shared.unfenced[places] = self.index + 1
            shared.stamp[places] = self.cta.clock

    def fence_proxy(self, mask):
        if self.launch.check_proxy:
            # Whole warps: finer would need the lane of each store.
            self.last_fence = self.cta.clock
            unfenced = self.cta.shared.unfenced
            unfenced[unfenced == self.index + 1] = 0

    def check_fenced(self, offsets, what):
        shared: SharedMemory = self.cta.shared
        if not self.launch.check_proxy:
            return
        touched = shared.unfenced[offsets] * (shared.stamp[offsets] > self.last_fence)
        if touched.any():
            raise PtxError(
                f"{what} reads {np.count_nonzero(touched)} bytes that warp {int(touched.max()) - 1} stored without a "
                "proxy fence behind"
            )
