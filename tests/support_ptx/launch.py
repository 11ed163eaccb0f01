"""A launch: what the driver checks before it, and its thread blocks one cluster after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from .cluster import Cluster
from .codegen import DTYPES, Program
from .instructions import KNOWN
from .memory import PARAM_BASE, GlobalMemory, Memory, PtxError
from .syntax import Kernel, Module

SHARED_START = 1024  # what the system keeps at the start of a thread block's shared memory on sm_90
MOST_SHARED = 232_448  # bytes that a thread block may have (CUDA programming guide, compute capability 9.0)
REGISTERS = 65_536  # of a multiprocessor


class Launch:
    """One launch of a kernel on a grid of thread blocks, `dynamic` bytes of shared memory for each."""

    def __init__(
        self,
        module: Module,
        kernel: str,
        grid: Sequence[int],
        threads: Sequence[int],
        dynamic: int,
        params: bytes,
        memory: GlobalMemory,
        cluster: Sequence[int] = (1, 1, 1),
        seed: int = 0,
    ) -> None:
        self.module, self.kernel = module, module.kernels[kernel]
        self.grid, self.threads, self.cluster = tuple(grid), tuple(threads), tuple(cluster)
        self.cluster_size = cluster[0] * cluster[1] * cluster[2]
        self.dynamic, self.memory, self.random = dynamic, memory, random.Random(seed)
        self.params = Memory(len(params))
        self.params.bytes[: len(params)] = np.frombuffer(params, np.uint8)
        self.check_proxy = "sm_9" in module.target
        count = threads[0] * threads[1] * threads[2]
        limit = self.kernel.directives.get("maxntid")
        if limit and count > int(np.prod(limit)):
            raise PtxError(f"{count} threads, .maxntid {limit}")
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise PtxError(f"grid {grid} is no multiple of the cluster {cluster}")
        self.registers = min(
            255, REGISTERS // (count * int((self.kernel.directives.get("minnctapersm") or [1])[0])) // 8 * 8
        )
        self.program = prepared(module, self.kernel)
        self.shared_end = self.program.shared_end + dynamic
        if self.shared_end - SHARED_START > MOST_SHARED:
            raise PtxError(f"{self.shared_end - SHARED_START} bytes of shared memory")
        self.local_bytes = self.program.local_bytes
        fresh = {kind: fresh_register(DTYPES[kind]) for kind in set(self.kernel.register_types)}
        self.fresh_registers = [fresh[kind] for kind in self.kernel.register_types]

    def run(self):
        gx, gy, gz = self.grid
        cx, cy, cz = self.cluster
        with np.errstate(all="ignore"):
            for z in range(0, gz, cz):
                for y in range(0, gy, cy):
                    for x in range(0, gx, cx):
                        positions = [(x + i, y + j, z + k) for k in range(cz) for j in range(cy) for i in range(cx)]
                        Cluster(self, positions).run()


def fresh_register(dtype: str) -> np.ndarray:
    """What a register holds before it is written: false, or all ones, which is NaN in every float format."""
    if dtype == "?":
        return np.zeros(32, bool)
    return np.full(32 * int(dtype[1]), 0xFF, np.uint8).view(dtype)


def prepared(module: Module, kernel: Kernel) -> Program:
    """The program, once for each kernel, with its parameters and its shared and local variables at their places."""
    if kernel.program is not None:
        return kernel.program
    symbols = {}
    ends = {"param": PARAM_BASE, "shared": SHARED_START, "local": 0}

    def place(name: str, space: str, size: int, align: int) -> None:
        ends[space] = (ends[space] + align - 1) // align * align
        symbols[name] = ends[space]
        ends[space] += size

    for param in kernel.params:
        place(param.name, "param", param.size, param.align)
    # Memory whose size the launch gives has size 0 and lies behind everything else.
    variables = [v for v in (*module.variables.values(), *kernel.variables.values()) if v.space in ends]
    for variable in sorted(variables, key=lambda v: v.size == 0):
        place(variable.name, variable.space, variable.size, variable.align)
    program = kernel.program = Program(kernel, symbols, KNOWN)
    program.shared_end = ends["shared"]
    program.local_bytes = (ends["local"] + 15) // 16 * 16
    return program
