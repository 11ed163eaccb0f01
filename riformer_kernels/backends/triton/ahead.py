"""Compiling the kernels for an architecture that this machine need not have, to see what the compiler makes of them.

    python -m riformer_kernels.backends.triton.ahead 90     # a table for S12 ... M48 at 224 px

The launchers run on the meta device and their launches are recorded, so what is compiled is what would be launched:
the same kernels, specialised in the same way, with the table's choices. Nothing here runs on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import block, choice, embed, head, moments, norm
from ._launch import ALIGNMENT, Launch, recorded

WIDTHS = ((64, 128, 320, 512), (96, 192, 384, 768))  # S12 to S36; M36 and M48
IMAGE = 224
CLASSES = 1000
EPS = 1e-5

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
    values = dict(zip(names, launch.arguments, strict=False)) | {k: v for k, v in launch.settings.items() if k in names}
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


def compiled_kernel(launch: Launch, architecture: int) -> Any:
    """One launch compiled to machine code for ``architecture``, as Triton has it."""
    return triton.compile(
        source(launch),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.settings["num_warps"], "enable_fp_fusion": True},
    )


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """Compile one launch to machine code for ``architecture`` and read the compiler's figures."""
    warps = launch.settings["num_warps"]
    compiled = compiled_kernel(launch, architecture)
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


def network(
    architecture: int,
    dtype: torch.dtype,
    *,
    parameters: torch.dtype | None = None,
    per_position: bool = False,
    image: int = IMAGE,
    training: bool = False,
) -> list[Launch]:
    """Every different launch that RIFormer S12 ... M48 make in ``dtype`` on an image of ``image`` x ``image`` pixels.

    Args:
        parameters: dtype of the parameters and images, which ``compute_dtype`` lets differ; None for ``dtype``.
        per_position: LayerNorm in place of GroupNorm(1).
        training: the training-time form, whose affine is folded by the kernels.
    """
    found: dict[tuple, Launch] = {}
    for widths in WIDTHS:
        for launch in _of_widths(architecture, dtype, parameters or dtype, widths, image, per_position, training):
            found.setdefault(_key(launch), launch)
    return list(found.values())


def _of_widths(
    architecture: int,
    dtype: torch.dtype,
    parameters: torch.dtype,
    widths: tuple[int, ...],
    image: int,
    per_position: bool,
    training: bool,
) -> list[Launch]:
    def parameter(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=parameters, device="meta")

    launches = []
    x, size, inputs = parameter(2, 3, image, image), image, 3
    statistics = None
    for stage, c in enumerate(widths):
        kernel, stride, padding = (3, 2, 1) if stage else (7, 4, 2)
        size = (size + 2 * padding - kernel) // stride + 1
        launches += record(
            architecture,
            embed.embed,
            x,
            parameter(c, inputs, kernel, kernel),
            parameter(c),
            stride,
            padding,
            dtype,
            True,
        )
        x = torch.empty((2, c, size, size), dtype=dtype, device="meta", memory_format=torch.channels_last)
        statistics, vector, inputs = torch.empty((2, 2, c), device="meta"), parameter(c), c
        affine = (vector, vector) if training else (None, None)
        launches += record(
            architecture, block.block, x, statistics, vector, vector, vector, *affine, EPS, vector, vector, EPS,
            parameter(4 * c, c, 1, 1), parameter(4 * c), parameter(c, 4 * c, 1, 1), vector, vector, per_position, True,
        )  # fmt: skip
        launches += record(architecture, norm.norm, x, statistics, vector, vector, EPS, per_position, dtype)
    launches += record(architecture, moments.moments, x)
    weight, bias = parameter(CLASSES, inputs), parameter(CLASSES)
    launches += record(architecture, head.head, x, statistics, vector, vector, EPS, weight, bias, per_position, dtype)
    return launches


def _key(launch: Launch) -> tuple:
    types = tuple(getattr(argument, "dtype", argument is None) for argument in launch.arguments)
    return launch.kernel.__name__, types, tuple(sorted(launch.settings.items()))


def width_of(launch: Launch) -> int:
    """C of a launch, 0 for the kernel without one."""
    return launch.settings.get("C", 0)


def lines(rows: list[tuple[str, int, Compiled]]) -> list[str]:
    """An aligned table of (dtype, C, compiled)."""
    header = ("kernel", "sm", "dtype", "C", "tile", "warps", "registers", "stack", "shared", "programs/SM", "matrix")
    cells = [
        (c.kernel, c.architecture, dtype, width or "-", c.tile, c.warps, c.registers, c.stack, c.shared,
         c.programs_per_processor, c.matrix or "-")
        for dtype, width, c in rows
    ]  # fmt: skip
    texts = [header, *(tuple(str(cell) for cell in row) for row in cells)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["90"]:
        table = [
            (str(dtype).removeprefix("torch."), width_of(launch), compile_launch(launch, int(wanted)))
            for dtype in (torch.bfloat16, torch.float32)
            for launch in network(int(wanted), dtype)
        ]
        print("\n".join(lines(table)))
