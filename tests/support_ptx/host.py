"""Host code linked against the fake CUDA runtime (`host/fake_cudart.cpp`): its launches are interpreted here.

What the host code gives to the driver is held to the driver's rules, too: the size of shared memory against what was
allowed for the kernel, the cluster, and every tensor map.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from ctypes import POINTER, c_char_p, c_int, c_int64, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from pathlib import Path

from . import parser
from .launch import Launch
from .memory import GlobalMemory, PtxError
from .syntax import Kernel, Module
from .tensor_map import TensorMap

MOST_CLUSTER = 8  # thread blocks, without asking for more (CUDA programming guide)
# Bytes of an element, by CUtensorMapDataType.
TENSOR_ELEMENTS = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2, 10: 4, 11: 4, 12: 4}
TENSOR_FLOATS = (6, 7, 8, 9, 10, 11, 12)


class LaunchRecord(ctypes.Structure):
    """As `fake_cudart.cpp` has it."""

    _fields_ = [
        ("kernel", c_char_p), ("grid", c_uint * 3), ("block", c_uint * 3), ("cluster", c_uint * 3),
        ("shared", c_ulonglong), ("shared_allowed", c_int), ("arguments", POINTER(c_void_p)),
    ]  # fmt: skip


class MapRecord(ctypes.Structure):
    """As `fake_cudart.cpp` has it."""

    _fields_ = [
        ("map", c_void_p), ("type", c_int), ("rank", c_int), ("interleave", c_int), ("swizzle", c_int),
        ("promotion", c_int), ("fill", c_int), ("base", c_ulonglong), ("sizes", POINTER(c_ulonglong)),
        ("strides", POINTER(c_ulonglong)), ("box", POINTER(c_uint)), ("steps", POINTER(c_uint)),
    ]  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """One launch that was interpreted."""

    kernel: str
    grid: int
    threads: int
    cluster: int


class Host:
    """A library of host code, and the PTX of its kernels. One call at a time."""

    def __init__(self, library: Path, units: Iterable[Path]) -> None:
        self.library = ctypes.CDLL(str(library))
        self.modules: dict[str, Module] = {}
        for file in units:
            module = parser.parse(file.read_text())
            self.modules |= dict.fromkeys(module.kernels.names(), module)
        self.memory = GlobalMemory()
        self.seed = 0
        self.ran: list[Ran] = []
        self.used: set[str] = set()  # kernels that any call has run
        self._error: BaseException | None = None
        launch_hook = ctypes.CFUNCTYPE(c_int, POINTER(LaunchRecord))
        map_hook = ctypes.CFUNCTYPE(c_int, POINTER(MapRecord))
        workspace_hook = ctypes.CFUNCTYPE(c_ulonglong, c_int64)
        self._hooks = (
            launch_hook(lambda record: self._guarded(lambda: self._start(record.contents))),
            map_hook(lambda record: self._guarded(lambda: self._encode(record.contents))),
            workspace_hook(lambda count: self.memory.allocate(count)),
        )
        self.library.ptx_hooks(*self._hooks[:2])
        self.library.ptx_workspace_hook(self._hooks[2])

    def call(self, name: str, words: Iterable[int]) -> None:
        """A function of the library that takes 64-bit words and returns an error text or null.

        Raises:
            PtxError: what a kernel does is undefined on a GPU.
            RuntimeError: the host code refused the arguments.
        """
        words = list(words)
        function = getattr(self.library, name)
        function.restype = c_char_p
        self._error, self.ran = None, []
        failed = function((c_int64 * len(words))(*(w - (1 << 64) if w >> 63 > 0 else w for w in words)))
        if self._error is not None:
            raise self._error
        if failed:
            raise RuntimeError(failed.decode())

    # What the fake runtime calls.

    def _guarded(self, act: Callable[[], None]) -> int:
        try:
            act()
        except BaseException as error:  # it must not cross the frames of C
            self._error = self._error or error
            return 1
        return 0

    def _start(self, record: LaunchRecord) -> None:
        name = record.kernel.decode()
        module = self.modules[name]
        if record.shared > record.shared_allowed:
            raise PtxError(f"{name}: {record.shared} bytes of shared memory, {record.shared_allowed} allowed")
        cluster = tuple(record.cluster)
        if cluster[0] * cluster[1] * cluster[2] > MOST_CLUSTER:
            raise PtxError(f"{name}: clusters of {cluster}")
        params = packed_parameters(module.kernels[name], record.arguments)
        launch = Launch(
            module, name, record.grid, record.block, record.shared, params, self.memory, cluster=cluster, seed=self.seed
        )
        launch.run()
        self.ran.append(Ran(name, record.grid[0], record.block[0], cluster[0]))
        self.used.add(name)

    def _encode(self, record: MapRecord) -> None:
        """The rules of cuTensorMapEncodeTiled; and what the map can read must be within one allocation."""
        if record.type not in TENSOR_ELEMENTS or not 1 <= record.rank <= 5:
            raise PtxError(f"tensor map of type {record.type}, rank {record.rank}")
        if record.map % 64:
            raise PtxError("the tensor map object is not 64-byte aligned")
        if record.interleave or record.promotion not in range(4) or record.swizzle not in range(4):
            raise PtxError(
                f"a tensor map with interleave {record.interleave}, swizzle {record.swizzle}, "
                f"promotion {record.promotion}"
            )
        if record.fill and record.type not in TENSOR_FLOATS:
            raise PtxError("a tensor map fills integers with NaN")
        if any(record.steps[i] != 1 for i in range(record.rank)):
            raise NotImplementedError("tensor maps with element strides")
        tensor = TensorMap(
            TENSOR_ELEMENTS[record.type], record.base, tuple(record.sizes[: record.rank]),
            tuple(record.strides[: record.rank - 1]), tuple(record.box[: record.rank]), record.swizzle, record.fill,
        )  # fmt: skip
        if reason := tensor.illegal():
            raise PtxError(f"cuTensorMapEncodeTiled refuses {tensor}: {reason}")
        if not self.memory.holds(tensor.base, tensor.reach()):
            raise PtxError(f"a tensor map reaches beyond its allocation: {tensor}")
        ctypes.memmove(record.map, tensor.pack(), 128)


def packed_parameters(kernel: Kernel, arguments: ctypes._Pointer) -> bytes:
    """The kernel's parameters, each at its alignment."""
    packed = b""
    for i, param in enumerate(kernel.params):
        packed = packed.ljust((len(packed) + param.align - 1) // param.align * param.align, b"\0")
        packed += ctypes.string_at(arguments[i], param.size)
    return packed
