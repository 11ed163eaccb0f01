"""Which variant of a kernel runs, and with which tiles: a frozen table. Pure functions, no Triton, no GPU needed.

Keyed on (C, N, dtype, architecture) and never on the batch, so that an image gives the same bits in any batch, and
nothing is tuned at run time. VERSION changes with any entry: results may then differ in their last bits.

The entries are estimates from what the compiler reports (registers, spills, shared memory); none has been timed yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ...dtypes import name_of

VERSION = 2
# Shared memory that one program may use, in bytes (CUDA C++ programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ARCHITECTURES = tuple(SHARED_MEMORY)
FUSED_CHANNELS = 192  # the widest whose second product's accumulator leaves registers for the first


def _nearest(architecture: int, entries: Iterable[int]) -> int:
    """The entry for a compute capability: its own, else the nearest below (86 -> 80, 103 -> 90)."""
    return max(entry for entry in entries if entry <= max(architecture, 80))


@dataclass(frozen=True)
class BlockProblem:
    """What a block's matrix kernels have to compute.

    Attributes:
        channels, hidden: C and the width of the hidden tensor.
        positions: N, per image.
        dtype: of the tokens and of the products' operands.
        architecture: compute capability as 80, 90, ...
    """

    channels: int
    hidden: int
    positions: int
    dtype: torch.dtype
    architecture: int


@dataclass(frozen=True)
class MatrixTile:
    """One matrix kernel: ``rows`` x ``columns`` of the result, ``depth`` terms of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class FusedTile:
    """The kernel that keeps the hidden tensor on the chip: ``rows`` positions, ``hidden`` hidden channels at a time,
    C in pieces of ``chunk``."""

    rows: int
    chunk: int
    hidden: int
    warps: int
    stages: int


@dataclass(frozen=True)
class BlockChoice:
    """``fused`` alone, or ``expand`` (norm, fc1, GELU) and ``project`` (fc2, residual, moments)."""

    fused: FusedTile | None
    expand: MatrixTile | None = None
    project: MatrixTile | None = None

    @property
    def rows(self) -> int:
        """Positions of a tile of the kernel that writes the result, and with it the moments of its tiles."""
        return self.fused.rows if self.fused is not None else self.two_kernels[1].rows

    @property
    def two_kernels(self) -> tuple[MatrixTile, MatrixTile]:
        """``expand`` and ``project``, where ``fused`` is None."""
        assert self.expand is not None and self.project is not None, self
        return self.expand, self.project


@dataclass(frozen=True)
class EmbedProblem:
    """A convolution to N output positions per image of C channels."""

    in_channels: int
    channels: int
    positions: int
    dtype: torch.dtype
    architecture: int


# (widest C, chunk, hidden, rows, warps, stages) of the fused kernel. 64 rows and 4 warps in 16 bits, as two or three
# programs then share a multiprocessor: one's GELU overlaps the other's products. (64 x 49 = 56 x 56: no row is wasted.)
# Where the matrix instruction is not wgmma, pieces of 64 channels spill at C = 192 and pieces of 32 do not.
_FUSED_16_BIT = {
    80: ((64, 64, 64, 64, 4, 2), (96, 32, 64, 64, 4, 2), (192, 32, 32, 64, 4, 2)),
    90: ((64, 64, 64, 64, 4, 2), (96, 32, 64, 64, 4, 2), (192, 64, 32, 64, 4, 2)),
    120: ((64, 64, 64, 64, 4, 2), (96, 32, 64, 64, 4, 2), (192, 32, 32, 64, 4, 2)),
}
# float32 products run on the ordinary units: smaller pieces and no pipeline, else the registers spill. Between 4 and 8
# warps the compiler's register allocation decides, architecture by architecture.
_FUSED_FLOAT32 = {
    80: ((64, 64, 32, 64, 8, 1), (96, 32, 16, 32, 4, 1), (192, 32, 16, 32, 8, 1)),
    120: ((64, 64, 32, 64, 8, 1), (96, 32, 16, 32, 8, 1), (128, 32, 16, 32, 4, 1), (192, 32, 16, 32, 8, 1)),
}
_MATRIX_16_BIT = MatrixTile(64, 128, 64, 4, 3)
_MATRIX_FLOAT32 = {80: MatrixTile(32, 64, 32, 4, 2), 100: MatrixTile(32, 64, 32, 4, 1)}


def _rows(positions: int, most: int) -> int:
    """Rows of a tile: at most ``most``, fewer for images with few positions (the rest of a tile is wasted work)."""
    rows = 16
    while rows < most and rows < positions:
        rows *= 2
    return rows


def _chunk(channels: int, most: int) -> int:
    """Width of the pieces of C: ``most`` where it divides C, else the 32 or 16 that wastes the least."""
    if channels % most == 0:
        return most
    return 32 if channels > 16 else 16


def _is_float32(dtype: torch.dtype) -> bool:
    """Whether the tables for float32 apply, and not those for 16 bits.

    Raises:
        ValueError: there are no tables for this dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the Triton kernels have no tiles for {name_of(dtype)}; add them to triton/choice.py")
    return dtype == torch.float32


def choose_block(problem: BlockProblem) -> BlockChoice:
    """The variant and tiles for a block."""
    wide = _is_float32(problem.dtype)
    if problem.channels <= FUSED_CHANNELS:
        table = _FUSED_FLOAT32 if wide else _FUSED_16_BIT
        entries = table[_nearest(problem.architecture, table)]
        _, chunk, hidden, rows, warps, stages = next(entry for entry in entries if problem.channels <= entry[0])
        rows = _rows(problem.positions, rows)
        return BlockChoice(FusedTile(rows, _chunk(problem.channels, chunk), hidden, warps if rows > 16 else 4, stages))
    tile = _MATRIX_FLOAT32[_nearest(problem.architecture, _MATRIX_FLOAT32)] if wide else _MATRIX_16_BIT
    tile = replace(tile, rows=_rows(problem.positions, tile.rows))
    # 320 = 5 x 64: a result's columns in pieces of 128 would be a fifth more work.
    project = replace(tile, columns=64) if problem.channels % 128 else tile
    # With wgmma, z goes from the norm into the product through registers. In a pipelined loop Triton (3.6 and 3.7, see
    # triton-lang/triton issue 9433) lets the next round write them while the product may still read them.
    wgmma = not wide and problem.architecture // 10 == 9
    return BlockChoice(None, replace(tile, stages=1) if wgmma else tile, project)


def choose_embed(problem: EmbedProblem) -> MatrixTile:
    """The tile for a stem or downsampling convolution."""
    if _is_float32(problem.dtype):
        tile = _MATRIX_FLOAT32[_nearest(problem.architecture, _MATRIX_FLOAT32)]
        return replace(tile, rows=_rows(problem.positions, tile.rows))
    columns = 64 if problem.channels % 128 else 128
    return MatrixTile(_rows(problem.positions, 64), columns, 32 if problem.in_channels < 16 else 64, 4, 3)
