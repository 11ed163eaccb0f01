"""Which variant of a kernel runs, and with which tiles: a frozen table. Pure functions, no Triton, no GPU needed.

Keyed on (C, N, dtype, architecture) and never on the batch, so that an image gives the same bits in any batch, and
nothing is tuned at run time. VERSION changes with any entry: results may then differ in their last bits.

The entries are estimates from what the compiler reports (registers, spills, shared memory); none has been timed yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

VERSION = 1
# Shared memory that one program may use, in bytes (CUDA C++ programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ARCHITECTURES = tuple(SHARED_MEMORY)
FUSED_CHANNELS = 192  # the widest whose second product's accumulator leaves registers for the first


def known(architecture: int) -> int:
    """The table's architecture for a compute capability: the nearest below (87 -> 86, 103 -> 100)."""
    return max((entry for entry in ARCHITECTURES if entry <= architecture), default=ARCHITECTURES[0])


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
    """One matrix kernel: ``rows`` x ``columns`` of the result, ``depth`` of the sum at a time, warps, pipeline stages."""

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


@dataclass(frozen=True)
class EmbedProblem:
    """A convolution: N output positions per image of C channels, each a sum over ``in_channels`` x ``taps``."""

    in_channels: int
    channels: int
    taps: int
    positions: int
    dtype: torch.dtype
    architecture: int


def _chunk(channels: int) -> int:
    """The widest of 64, 32, 16 that wastes nothing, else the narrowest number of 64s or less that covers C."""
    for width in (64, 32, 16):
        if channels % width == 0:
            return width
    return 64 if channels > 32 else 32 if channels > 16 else 16


def _rows(positions: int, most: int) -> int:
    """Rows of a tile: at most ``most``, fewer for images with few positions (the rest of a tile is wasted work)."""
    rows = 16
    while rows < most and rows < positions:
        rows *= 2
    return rows


def choose_block(problem: BlockProblem) -> BlockChoice:
    """The variant and tiles for a block."""
    architecture = known(problem.architecture)
    small = SHARED_MEMORY[architecture] < 110_000
    if problem.dtype == torch.float32:
        if problem.channels <= FUSED_CHANNELS:
            rows = _rows(problem.positions, 32 if problem.channels > 64 else 64)
            return BlockChoice(FusedTile(rows, _chunk(problem.channels), 32, 4, 1))
        rows = _rows(problem.positions, 64)
        return BlockChoice(None, MatrixTile(rows, 64, 32, 4, 2), MatrixTile(rows, 64, 32, 4, 2))
    if problem.channels <= FUSED_CHANNELS:
        rows = _rows(problem.positions, 64 if small else 128)
        return BlockChoice(FusedTile(rows, _chunk(problem.channels), 64, 8 if rows > 64 else 4, 2))
    rows = _rows(problem.positions, 64 if problem.positions <= 256 else 128)
    tile = MatrixTile(rows, 128, 64, 4, 3)
    return BlockChoice(None, tile, tile)


def choose_embed(problem: EmbedProblem) -> MatrixTile:
    """The tile for a stem or downsampling convolution."""
    if problem.dtype == torch.float32:
        return MatrixTile(_rows(problem.positions, 64), 64, 32, 4, 2)
    rows = _rows(problem.positions, 64 if problem.positions <= 256 else 128)
    return MatrixTile(rows, 64 if problem.channels % 128 else 128, 32 if problem.in_channels < 16 else 64, 4, 3)
