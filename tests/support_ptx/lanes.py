"""The part of a warp in which its lanes work together: votes, shuffles, barriers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .codegen import EXIT
from .memory import PtxError

ALL = np.ones(32, bool)
LANES = np.arange(32)
REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip

EVERYBODY = np.full(32, 0xFFFFFFFF, np.uint32).tobytes()


@lru_cache(maxsize=1024)
def sources_of(mode: str, b: bytes, c: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The lane that each lane of a shuffle reads, and whether that is within its segment (PTX ISA, `shfl.sync`)."""
    b, c = np.frombuffer(b, np.uint32), np.frombuffer(c, np.uint32)
    segment, clamp = (c >> np.uint32(8)) & np.uint32(31), c & np.uint32(31)
    low, high = (LANES & segment), (LANES & segment) | (clamp & ~segment & 31)
    b = (b & np.uint32(31)).astype(int)
    if mode == "bfly":
        source = LANES ^ b
        valid = source <= high
    elif mode == "up":
        source = LANES - b
        valid = source >= high
    elif mode == "down":
        source = LANES + b
        valid = source <= high
    else:
        source = low | (b & ~segment & 31)
        valid = source <= high
    return np.where(valid, source, LANES).astype(int), valid


class Lanes:
    def check_members(self, members, mask, what):
        if mask is None and self.full and members.tobytes() == EVERYBODY:
            return
        active = ALL if mask is None else mask
        named = (members[active][0] >> LANES.astype(np.uint32) & 1).astype(bool)
        if (named & self.live & ~active & (self.pcs != EXIT)).any() and mask is not None:
            raise PtxError(f"{what}: lanes of its mask are not there")
        if (active & ~named).any():
            raise PtxError(f"{what}: a lane that runs it is not in its mask")

    def shuffle(self, mode, value, b, c, members, mask):
        self.check_members(members, mask, "shfl")
        source, valid = sources_of(mode, b.tobytes(), c.tobytes())
        active = ALL if mask is None else mask
        if (~active[source] & active).any():
            raise PtxError("shfl from a lane that does not take part")
        return value[source], valid

    def vote(self, mode, p, members, mask):
        self.check_members(members, mask, "vote")
        active = ALL if mask is None else mask
        if mode == "ballot":
            return np.full(32, int(((p & active).astype(np.int64) << LANES).sum()), np.uint32)
        value = {"all": p[active].all(), "any": p[active].any(), "uni": len(set(p[active].tolist())) < 2}[mode]
        return np.full(32, value, bool)

    def redux(self, mode, a, members, mask):
        self.check_members(members, mask, "redux")
        active = ALL if mask is None else mask
        return np.full(32, REDUCTIONS[mode].reduce(a[active]), a.dtype)

    def elect(self, mask):
        active = ALL if mask is None else mask
        leader = int(np.flatnonzero(active)[0])
        return np.full(32, leader, np.uint32), leader == LANES

    # Barriers.

    def uniform(self, value, mask, what):
        values = value if mask is None else value[mask]
        if (values != values[0]).any():
            raise PtxError(f"{what} differs between the lanes of a warp")
        return int(values[0])

    def barrier(self, mode, identity, count, mask):
        if mask is not None and not mask.any():
            return True
        which = self.uniform(identity, mask, "barrier number")
        expected = self.uniform(count, mask, "barrier count") if count is not None else self.cta.barrier_threads()
        if which > 15 or expected % 32:
            raise PtxError(f"barrier {which} of {expected} threads")
        return self.cta.barriers[which].arrive(self, expected, mode == "sync")

    def cluster_barrier(self, mode, mask):
        return self.cluster.arrive_or_wait(self, mode)

    def set_registers(self, direction, count, mask):
        if count % 8 or not 24 <= count <= 256:
            raise PtxError(f"setmaxnreg {count}")
        return self.cta.set_registers(self, direction, count)
