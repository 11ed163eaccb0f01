"""The part of a warp that finds memory: state spaces, generic addresses, loads, stores, atomics."""

from __future__ import annotations

import numpy as np

from .lanes import ALL, LANES
from .memory import GLOBAL_BASE, LOCAL_BASE, PARAM_BASE, SHARED_BASE, WINDOW, Memory, PtxError, SharedMemory

# Of the old value, an operand, and the second operand of a compare-and-swap.
ATOMICS = {
    "add": lambda old, v, _: old + v, "min": lambda old, v, _: np.minimum(old, v),
    "max": lambda old, v, _: np.maximum(old, v), "and": lambda old, v, _: old & v, "or": lambda old, v, _: old | v,
    "xor": lambda old, v, _: old ^ v, "exch": lambda old, v, _: v,
    "cas": lambda old, v, to: np.where(old == v, to, old),
    "inc": lambda old, v, _: np.where(old >= v, 0, old + 1),
}  # fmt: skip


class Spaces:
    def cvta(self, address, parts):
        base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(parts[-1].split("::")[0], 0)
        return address - np.uint64(base) if parts[0] == "to" else address + np.uint64(base)

    def isspace(self, address, space):
        base = {"shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE}.get(space.split("::")[0])
        if base is None:
            return address >= np.uint64(GLOBAL_BASE)
        return (address >= np.uint64(base)) & (address < np.uint64(base + WINDOW))

    def mapa(self, address, rank, mask):
        if (rank if mask is None else rank[mask]).max(initial=0) >= self.launch.cluster_size:
            raise PtxError("mapa: no such thread block in the cluster")
        return (address & np.uint32(0xFFFFFF)) | ((rank + np.uint32(1)) << np.uint32(24))

    def cta_rank_of(self, address):
        high = address >> np.uint32(24)
        return np.where(high == 0, self.cta.rank, high - 1).astype(np.uint32)

    def memory_of(self, space, at):
        """The memory and the offsets in it; all lanes in one."""
        if space == "shared":
            return self.cta.shared, at
        if space == "global":
            return self.launch.memory, at - GLOBAL_BASE
        if space == "param":
            return self.launch.params, at - PARAM_BASE
        if space == "const":
            return self.launch.memory, at - GLOBAL_BASE
        if space == "local":
            if self.local is None:
                self.local = Memory(32 * self.launch.local_bytes)
            return self.local, at + LANES[: len(at)] * self.launch.local_bytes
        if space == "cluster":
            rank = int(at[0]) >> 24
            if ((at >> 24) != rank).any():
                raise NotImplementedError("lanes in different thread blocks of the cluster")
            cta = self.cta if rank == 0 else self.cluster.ctas[rank - 1]
            return cta.shared, at & 0xFFFFFF
        windows = ((SHARED_BASE, "shared"), (LOCAL_BASE, "local"), (PARAM_BASE, "param"))
        for base, name in windows:
            inside = (at >= base) & (at < base + WINDOW)
            if inside.all():
                return self.memory_of(name, at if name == "param" else at - base)
            if inside.any():
                raise NotImplementedError("lanes in different state spaces")
        return self.launch.memory, at - GLOBAL_BASE

    def load(self, space, at, dtype, count, mask):
        if mask is None:
            memory, offset = self.memory_of(space, at)
            return memory.load(offset, dtype, count)
        if not mask.any():
            return [np.zeros(32, dtype)] * count
        if space == "local":
            memory, offset = self.memory_of(space, at)
            offset = offset[mask]
        else:
            memory, offset = self.memory_of(space, at[mask])
        out = []
        for part in memory.load(offset, dtype, count):
            whole = np.zeros(32, dtype)
            whole[mask] = part
            out.append(whole)
        return out

    def store(self, space, at, dtype, values, mask):
        if mask is not None:
            if not mask.any():
                return
            values = [v[mask] for v in values]
        if space == "local":
            memory, offset = self.memory_of(space, at)
            offset = offset if mask is None else offset[mask]
        else:
            memory, offset = self.memory_of(space, at if mask is None else at[mask])
        memory.store(offset, dtype, values)
        if type(memory) is SharedMemory and self.launch.check_proxy:
            memory.check_unread(offset, "a store")
            self.note_store(memory, offset[:, None] + np.arange(int(dtype[1]) * len(values)))

    def atomic(self, space, operation, at, kind, values, mask):
        mask = ALL if mask is None else mask
        out = np.zeros(32, values[0].dtype)
        for lane in np.flatnonzero(mask):
            memory, offset = self.memory_of(space, at[lane : lane + 1])
            dtype = values[0].dtype.str[1:]
            old = memory.load(offset, dtype, 1)[0]
            other = values[1][lane : lane + 1] if len(values) > 1 else None
            new = ATOMICS[operation](old, values[0][lane : lane + 1], other).astype(old.dtype)
            memory.store(offset, dtype, [new])
            out[lane] = old[0]
        self.cluster.progress += 1
        return out
