"""Compiling the kernels for an architecture that this machine need not have, to see what the compiler makes of them.

The launchers run on the meta device and their launches are recorded, so what is compiled is what would be launched:
the same kernels, specialised in the same way, with the table's choices. Nothing here runs on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import choice
from ._launch import ALIGNMENT, Launch, recorded

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS_PER_PROCESSOR = 65_536
WARPS_PER_PROCESSOR = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled.

    Attributes:
        kernel: its name.
        architecture: compute capability as 80, 90, ...
        tile: the constexpr arguments that the table chose, as text.
        warps: per program.
        registers: per thread.
        stack: bytes per thread in local memory: spills, or arrays that the compiler could not keep in registers.
        shared: bytes per program.
        matrix: the matrix instruction in the PTX ("wgmma", "tcgen05", "mma"), or None.
    """

    kernel: str
    architecture: int
    tile: str
    warps: int
    registers: int
    stack: int
    shared: int
    matrix: str | None

    @property
    def programs_per_processor(self) -> int:
        """Programs that fit on one multiprocessor, by registers, shared memory and warps."""
        threads = 32 * self.warps
        by_registers = REGISTERS_PER_PROCESSOR // (-(-self.registers // 8) * 8 * threads)
        available = choice.SHARED_MEMORY[self.architecture] + 1024
        by_memory = available // (self.shared + 1024)
        return min(by_registers, by_memory, WARPS_PER_PROCESSOR[self.architecture] // self.warps, 32)


def record(architecture: int, call: Callable[..., Any], *arguments: Any) -> list[Launch]:
    """What ``call``, a launcher, launches for tensors on the meta device."""
    with recorded(architecture) as launches:
        call(*arguments)
    return launches


def source(launch: Launch) -> ASTSource:
    """The kernel specialised as Triton's just-in-time compiler does it for these arguments."""
    names = list(launch.kernel.arg_names)
    values = dict(zip(names, launch.arguments)) | {k: v for k, v in launch.settings.items() if k in names}
    plain = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    constants = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        if name in constants or value is None or (isinstance(value, int) and value == 1 and name not in plain):
            signature[name], constexprs[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", ALIGNMENT]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if name not in plain and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """Compile one launch to machine code for ``architecture`` and read the compiler's figures."""
    warps = launch.settings["num_warps"]
    compiled = triton.compile(
        source(launch), target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    ptx = compiled.asm["ptx"]
    # In this order: PTX for Blackwell and Hopper may name the older instruction as well.
    matrix = next((name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in ptx), None)
    registers, stack = _resources(compiled.asm["cubin"])
    shown = ("ROWS", "COLUMNS", "DEPTH", "CHUNK", "BLOCK", "STAGES")
    tile = " ".join(f"{key.lower()}={launch.settings[key]}" for key in shown if key in launch.settings)
    name = launch.kernel.__name__.strip("_")
    return Compiled(name, architecture, tile, warps, registers, stack, compiled.metadata.shared, matrix)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]
