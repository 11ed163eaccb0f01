"""Flat memories with checked accesses.

`GlobalMemory` hands out allocations at 256-byte aligned addresses with unallocated bytes between them; an access that
touches a byte outside an allocation is an error. Fresh memory is all ones: NaN in every float format.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

GLOBAL_BASE = 0x7F40_0000_0000
SHARED_BASE = 0x7E00_0000_0000
LOCAL_BASE = 0x7D00_0000_0000
PARAM_BASE = 0x7C00_0000_0000
WINDOW = 1 << 32


class PtxError(Exception):
    """Something that is undefined or an error on a GPU."""


class Memory:
    name = "memory"

    def __init__(self, size: int, fill: int = 0xFF):
        self.size = size
        self.bytes = np.full((size + 31) // 16 * 16, fill, np.uint8)
        self.make_views()

    def make_views(self):
        self.views = {t: self.bytes.view(t) for t in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")}

    def check(self, at, count: int):
        # Negative offsets are large numbers without their sign.
        if at.size and int(at.view(np.uint64).max()) + count > self.size:
            bad = at[(at < 0) | (at + count > self.size)]
            raise PtxError(f"access of {count} bytes at {self.name} {int(bad[0]):#x} of {self.size:#x}")

    def load(self, at, dtype: str, count: int):
        size = int(dtype[1])
        total = size * count
        if total > 1 and int(np.bitwise_or.reduce(at, axis=None)) & (total - 1):
            raise PtxError(f"misaligned load of {total} bytes at {self.name} {[hex(a) for a in at[:4].tolist()]}")
        self.check(at, total)
        index = at // size
        view = self.views[dtype]
        return [view[index + i] if i else view[index] for i in range(count)]

    def store(self, at, dtype: str, values):
        size = int(dtype[1])
        total = size * len(values)
        if total > 1 and int(np.bitwise_or.reduce(at, axis=None)) & (total - 1):
            raise PtxError(f"misaligned store of {total} bytes at {self.name} {[hex(a) for a in at[:4].tolist()]}")
        self.check(at, total)
        index = at // size
        view = self.views[dtype]
        for i, value in enumerate(values):
            view[index + i] = value

    def raw(self, at: int, count: int):
        self.check(np.array([at]), count)
        return self.bytes[at : at + count]


class GlobalMemory(Memory):
    name = "global"

    def __init__(self, capacity: int = 1 << 24):
        super().__init__(capacity)
        self.valid = np.zeros(capacity, bool)
        self.end = 4096
        self.sizes: dict[int, int] = {}

    def allocate(self, size: int, align: int = 256) -> int:
        """An address. At least 256 bytes before and behind belong to nobody."""
        start = (self.end + 256 + align - 1) // align * align
        self.end = start + size
        while self.end + 4096 > self.size:
            self.bytes = np.concatenate([self.bytes, np.full(self.size, 0xFF, np.uint8)])
            self.valid = np.concatenate([self.valid, np.zeros(self.size, bool)])
            self.size *= 2
            self.make_views()
        self.valid[start : self.end] = True
        self.sizes[GLOBAL_BASE + start] = size
        return GLOBAL_BASE + start

    @contextmanager
    def frame(self) -> Iterator[None]:
        """What is allocated meanwhile is given back at the end."""
        mark, kept = self.end, dict(self.sizes)
        try:
            yield
        finally:
            self.bytes[mark : self.end] = 0xFF
            self.valid[mark : self.end] = False
            self.end, self.sizes = mark, kept

    def put(self, array, align: int = 256) -> int:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self.allocate(max(raw.size, 1), align)
        self.bytes[address - GLOBAL_BASE : address - GLOBAL_BASE + raw.size] = raw
        return address

    def holds(self, address: int, count: int) -> bool:
        """Whether so many bytes from `address` on lie in one allocation."""
        start = max((a for a in self.sizes if a <= address), default=None)
        return start is not None and address + count <= start + self.sizes[start]

    def get(self, address: int, dtype, shape):
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        at = address - GLOBAL_BASE
        return self.bytes[at : at + count].view(dtype).reshape(shape).copy()

    def check(self, at, count: int):
        super().check(at, count)
        inside = self.valid[at] & self.valid[at + count - 1]
        if not inside.all():
            bad = int(at[~inside][0])
            near = min(
                self.sizes, key=lambda a: min(abs(a - GLOBAL_BASE - bad), abs(a - GLOBAL_BASE + self.sizes[a] - bad))
            )
            raise PtxError(
                f"access of {count} bytes at global {bad + GLOBAL_BASE:#x}, {bad + GLOBAL_BASE - near} bytes from the "
                f"start of an allocation of {self.sizes[near]}"
            )


class SharedMemory(Memory):
    """Of one thread block. `unfenced` has, per byte, the warp (+ 1) whose ordinary store is not yet visible to the
    asynchronous proxy (wgmma, tensor copies), and `stamp` when it was made. Visible makes it a proxy fence of that
    warp, or one of the warp that starts the asynchronous access, behind the store."""

    name = "shared"

    def __init__(self, size: int):
        super().__init__(size)
        self.unfenced = np.zeros(self.size, np.uint8)
        self.stamp = np.zeros(self.size, np.int64)
        self.reading = np.zeros(self.size, np.int16)  # products under way that read each byte
        self.readers = 0

    def check_unread(self, offsets, what):
        if self.readers and self.reading[offsets].any():
            raise PtxError(f"{what} over shared memory that a wgmma under way reads")
