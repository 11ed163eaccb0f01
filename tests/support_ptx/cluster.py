"""Thread blocks and their cluster: barriers, the pool of registers, and the order in which warps take turns."""

from __future__ import annotations

from .memory import PtxError, SharedMemory
from .warp import Warp


class NamedBarrier:
    """One of the sixteen barriers of a thread block."""

    def __init__(self):
        self.generation, self.arrived, self.expected, self.members = 0, 0, 0, {}

    def arrive(self, warp, expected, wait):
        if warp in self.members and self.members[warp] < self.generation:
            del self.members[warp]
            return True
        if warp in self.members:
            return False
        if self.arrived and expected != self.expected:
            raise PtxError(f"barrier taken with {expected} and with {self.expected} threads")
        self.expected = expected
        self.arrived += 32
        if self.arrived > expected:
            raise PtxError("more threads at a barrier than it expects")
        if wait:
            self.members[warp] = self.generation
        warp.cluster.progress += 1
        if self.arrived == expected:
            self.arrived = 0
            self.generation += 1
            self.members.pop(warp, None)
            return True
        return not wait


class Cta:
    """A thread block (PTX: cooperative thread array), with what its warps share."""

    def __init__(self, cluster, launch, position, rank):
        self.cluster, self.launch, self.position, self.rank = cluster, launch, position, rank
        self.index = position[0]
        self.shared = SharedMemory(launch.shared_end)
        self.mbarriers = {}
        self.clock = 0  # of ordinary stores to shared memory
        self.barriers = [NamedBarrier() for _ in range(16)]
        threads = launch.threads[0] * launch.threads[1] * launch.threads[2]
        self.warps = [Warp(self, i, threads) for i in range((threads + 31) // 32)]
        self.wgmma_log = {}
        self.register_pool = 0
        self.register_counts = dict.fromkeys(self.warps, launch.registers)

    def barrier_threads(self):
        return 32 * len(self.warps)

    def set_registers(self, warp, direction, count):
        have = self.register_counts[warp]
        if direction == "dec":
            if count > have:
                raise PtxError(f"setmaxnreg.dec to {count} of {have}")
            self.register_pool += 32 * (have - count)
            self.register_counts[warp] = count
            self.cluster.progress += 1
            return True
        if count < have:
            raise PtxError(f"setmaxnreg.inc to {count} of {have}")
        if self.register_pool < 32 * (count - have):
            return False
        self.register_pool -= 32 * (count - have)
        self.register_counts[warp] = count
        return True


class Cluster:
    """Thread blocks that run together. `progress` counts what may let a waiting warp go on."""

    def __init__(self, launch, positions):
        self.launch, self.random = launch, launch.random
        self.progress = 0
        self.events = []  # asynchronous copies under way
        self.arrived, self.generation, self.phase_of = 0, 0, {}
        self.ctas = []
        for rank, position in enumerate(positions):
            self.ctas.append(Cta(self, launch, position, rank))

    def arrive_or_wait(self, warp, mode):
        if mode == "arrive":
            if warp in self.phase_of:
                raise PtxError("barrier.cluster.arrive twice without a wait")
            self.phase_of[warp] = self.generation
            self.arrived += 1
            self.complete()
            return True
        if warp not in self.phase_of:
            raise PtxError("barrier.cluster.wait without arrive")
        if self.phase_of[warp] == self.generation:
            return False
        del self.phase_of[warp]
        return True

    def complete(self):
        # Threads that have ended count as arrived.
        waiting = sum(1 for c in self.ctas for w in c.warps if not w.done and w not in self.phase_of)
        if self.arrived and waiting == 0:
            self.arrived = 0
            self.generation += 1
            self.progress += 1

    def deliver(self):
        event = self.events.pop(self.random.randrange(len(self.events)))
        event()
        self.progress += 1

    def run(self):
        warps = [w for c in self.ctas for w in c.warps]
        pick = self.random
        slow, turns = set(), 0
        while warps:
            turns += 1
            if turns % 256 == 1:  # some warps hardly run for a while, or what races stays a few instructions wide
                slow = {w for w in warps if pick.random() < 0.3}
            ready = [w for w in warps if w.seen_progress != self.progress]
            if self.events and (not ready or pick.random() < 0.3):
                self.deliver()
                continue
            if not ready:
                raise PtxError("\n".join(["nothing can go on:", *map(waiting_for, filter(stopped, warps))]))
            warp = pick.choice(ready)
            if warp in slow and pick.random() < 0.97:
                warp = pick.choice(ready)
            before = self.progress
            if warp.run(pick.choice((1, 2, 8, 64))):
                warp.seen_progress = -1
            else:
                warp.seen_progress = before if self.progress == before else -1
            if warp.done:
                warps.remove(warp)
                warp.finish()
                self.progress += 1
                self.complete()
        for warp in (warp for cta in self.ctas for warp in cta.warps):
            if problem := warp.pending_problem():
                raise PtxError(f"thread block {warp.cta.index}, warp {warp.index} ended with {problem}")


def stopped(warp: Warp) -> bool:
    return warp.waits_for is not None


def waiting_for(warp: Warp) -> str:
    at = warp.waits_for
    return f"  thread block {warp.cta.index}, warp {warp.index} waits at line {at.line}: {at.text[:100]}"
