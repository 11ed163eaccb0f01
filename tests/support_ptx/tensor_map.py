"""Tensor maps, and where the copy engine puts what it copies."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .memory import PtxError

MAP_MAGIC = b"ptx-check map 1\0"
SWIZZLE_SPAN = {0: 1, 1: 32, 2: 64, 3: 128}  # of CUtensorMapSwizzle, in bytes


@dataclass
class TensorMap:
    """What a 128-byte tensor map holds here. Dimensions from the innermost on; strides in bytes, of dimension 1 on."""

    size: int  # of an element
    base: int
    dims: tuple
    strides: tuple
    box: tuple
    swizzle: int
    nan_fill: int = 0

    def pack(self) -> bytes:
        rank = len(self.dims)
        values = [rank, self.size, self.base, self.swizzle, self.nan_fill, *self.dims, *self.strides, *self.box]
        data = MAP_MAGIC + struct.pack("<BBQBB", *values[:5]) + struct.pack(f"<{rank}Q{rank - 1}Q{rank}I", *values[5:])
        if len(data) > 128:
            raise NotImplementedError("a tensor map of more than three dimensions")
        return data.ljust(128, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> TensorMap:
        if data[:16] != MAP_MAGIC:
            raise PtxError("no tensor map lies at this address")
        rank, size, base, swizzle, nan_fill = struct.unpack_from("<BBQBB", data, 16)
        rest = struct.unpack_from(f"<{rank}Q{rank - 1}Q{rank}I", data, 28)
        return cls(size, base, rest[:rank], rest[rank : 2 * rank - 1], rest[2 * rank - 1 :], swizzle, nan_fill)

    def illegal(self) -> str:
        """Why the driver would refuse it (CUDA driver API, cuTensorMapEncodeTiled), or nothing."""
        rank = len(self.dims)
        span = SWIZZLE_SPAN[self.swizzle]
        inner = self.box[0] * self.size
        if self.base % 16:
            return f"base {self.base:#x} is not 16-byte aligned"
        if any(not 0 < d <= 1 << 32 for d in self.dims):
            return f"dimensions {self.dims}"
        if any(s % 16 or not 0 <= s < 1 << 40 for s in self.strides):
            return f"strides {self.strides}"
        reach = self.dims[0] * self.size
        for i in range(1, rank):
            if self.dims[i] == 1:  # its stride is never used; CUTLASS gives 0
                continue
            if self.strides[i - 1] < reach:
                return f"stride {self.strides[i - 1]} is less than the {reach} bytes of the dimension inside"
            reach = self.strides[i - 1] * self.dims[i]
        if any(not 0 < b <= 256 for b in self.box):
            return f"box {self.box}"
        if inner % 16:
            return f"{inner} bytes of the box's inner dimension"
        if self.swizzle and inner > span:
            return f"{inner} bytes of the box's inner dimension with a swizzle of {span}"
        return ""

    def reach(self) -> int:
        """Bytes from the base to behind the last element."""
        return sum((d - 1) * s for d, s in zip(self.dims[1:], self.strides, strict=True)) + self.dims[0] * self.size

    def smem_offsets(self, start: int):
        """Addresses of the box's elements [..., outer, inner] in shared memory."""
        inner = self.box[0] * self.size
        span = SWIZZLE_SPAN[self.swizzle]
        if self.swizzle and inner != span:
            raise NotImplementedError("a box narrower than its swizzle")
        count = int(np.prod(self.box))
        linear = start + np.arange(count) * self.size
        return swizzle(linear, span).reshape(self.box[::-1])

    def global_offsets(self, coordinates):
        """Addresses of the box's elements and which of them lie inside."""
        address = np.full((1,) * len(self.box), self.base, np.int64)
        inside = np.ones((1,) * len(self.box), bool)
        for i, (start, box, dim) in enumerate(zip(coordinates, self.box, self.dims, strict=True)):
            at = start + np.arange(box)
            shape = [1] * len(self.box)
            shape[len(self.box) - 1 - i] = box
            pitch = self.size if i == 0 else self.strides[i - 1]
            address = address + (at * pitch).reshape(shape)
            inside = inside & ((at >= 0) & (at < dim)).reshape(shape)
        shape = self.box[::-1]
        return np.broadcast_to(address, shape), np.broadcast_to(inside, shape)


def swizzle(address, span: int):
    """The 16-byte pieces of `span` bytes change places with the address bits from 128 on."""
    mask = {1: 0, 32: 1, 64: 3, 128: 7}[span]
    return address ^ ((address >> 7 & mask) << 4)
