"""``block`` and ``block_`` on the GPU: the block as two affine maps per image and channel, then two matrix products.

    y = x + u xc + w,  z = P xc + Q          xc = x - mu1; the maps are made by ``block_maps``
    out = y + ls2 * (W2 gelu(W1 z + b1) + b2)

There are two variants. ``_fused_kernel`` keeps the hidden tensor on the chip. ``_expand_kernel`` writes it to memory,
and ``_project_kernel`` reads it. Both leave the moments of each tile, which ``moments.merge`` puts together in a fixed
order. A tile reads and writes its own rows alone, so the result may lie over ``x``. Tiles end where an image does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import BackendError
from ...ops.block import BlockParameters
from . import choice
from ._launch import (
    architecture_of,
    as_tokens,
    dense_moments,
    in_layout_of,
    launch,
    matrix,
    precision,
    result_like,
    vector,
)  # fmt: skip
from ._math import add_product, gelu, store_tile_moments
from .block_maps import block_maps
from .moments import merge, tile_moments


@triton.jit
def _load_statistics(maps, statistics, row, inside, C: tl.constexpr, PER_POSITION: tl.constexpr):
    """mu1, r1, mu2 - mu1, r2: of each row [rows, 1] with PER_POSITION, else the image's mu1 alone."""
    if PER_POSITION:
        at = statistics + row * 4
        mu1 = tl.load(at, inside, 0.0)
        found = (mu1, tl.load(at + 1, inside, 0.0), tl.load(at + 2, inside, 0.0), tl.load(at + 3, inside, 0.0))
    else:
        mu1 = tl.load(maps + 4 * C)
        found = (mu1, mu1, mu1, mu1)
    return found


@triton.jit
def _first_half(x, statistics, maps, channel, C: tl.constexpr, PER_POSITION: tl.constexpr):
    """y - x of float32 ``x`` [rows, chunk], and x - mu1."""
    mu1, rstd1, _, _ = statistics
    u = tl.load(maps + channel, channel < C, 0.0)[None, :]
    w = tl.load(maps + C + channel, channel < C, 0.0)[None, :]
    xc = x - mu1
    if PER_POSITION:
        change = (xc * rstd1) * u + w
    else:
        change = xc * u + w
    return change, xc


@triton.jit
def _normed(x, statistics, maps, channel, C: tl.constexpr, PER_POSITION: tl.constexpr):
    """z, what fc1 reads, of float32 ``x`` [rows, chunk]."""
    mu1, _, shift, rstd2 = statistics
    p = tl.load(maps + 2 * C + channel, channel < C, 0.0)[None, :]
    q = tl.load(maps + 3 * C + channel, channel < C, 0.0)[None, :]
    if PER_POSITION:
        change, xc = _first_half(x, statistics, maps, channel, C, PER_POSITION)
        z = ((xc + change) - shift) * rstd2 * p + q
    else:
        z = (x - mu1) * p + q
    return z


@triton.jit
def _finish(
    branch, x, statistics, maps, fc2_bias, layer_scale_2, out, partials, channel, inside, count, offset,
    C: tl.constexpr, PER_POSITION: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """``out = y + ls2 * (branch + b2)`` for [rows, chunk], stored, and with it the moments of what was stored."""
    there = inside & (channel < C)[None, :]
    if fc2_bias is not None:
        branch += tl.load(fc2_bias + channel, channel < C, 0.0).to(tl.float32)[None, :]
    if layer_scale_2 is not None:
        branch *= tl.load(layer_scale_2 + channel, channel < C, 0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        values = tl.load(x + offset, there, 0.0).to(tl.float32)
        change, _ = _first_half(values, statistics, maps, channel, C, PER_POSITION)
        branch += values + change
    rounded = branch.to(out.dtype.element_ty)
    tl.store(out + offset, rounded, there)
    if not PER_POSITION:
        store_tile_moments(partials, rounded.to(tl.float32), inside, count, channel, C)


@triton.jit(do_not_specialize=["positions"])
def _fused_kernel(
    x,  # tokens [B, N, C]
    out,  # tokens [B, N, C]; may be x
    partials,  # out: [B, tiles, 2, C] float32, not written with PER_POSITION
    maps,  # [B, 5, C] float32
    statistics,  # [B, N, 4] float32, or None
    fc1_weight,  # [HIDDEN, C]
    fc1_bias,  # [HIDDEN] or None
    fc2_weight,  # [C, HIDDEN]
    fc2_bias,  # [C] or None
    layer_scale_2,  # [C] or None
    positions,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_POSITION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunks: tl.constexpr = (C + CHUNK - 1) // CHUNK
    dtype = x.dtype.element_ty
    tiles = tl.cdiv(positions, ROWS)
    program = tl.program_id(0)
    image, tile = program // tiles, program % tiles
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, CHUNK)
    step = tl.arange(0, BLOCK)
    inside = tile * ROWS + row < positions
    start = image.to(tl.int64) * positions + tile * ROWS
    x += start * C
    out += start * C
    if PER_POSITION:
        statistics += start * 4
    else:
        maps += image.to(tl.int64) * (5 * C)
    stats = _load_statistics(maps, statistics, row, inside, C, PER_POSITION)
    normed = ()
    sums = ()
    for i in tl.static_range(chunks):
        channel = i * CHUNK + lane
        values = tl.load(x + row * C + channel[None, :], inside & (channel < C)[None, :], 0.0).to(tl.float32)
        normed = normed + (_normed(values, stats, maps, channel, C, PER_POSITION).to(dtype),)
        sums = sums + (tl.zeros((ROWS, CHUNK), tl.float32),)
    for begin in tl.range(0, HIDDEN, BLOCK, num_stages=STAGES):
        hidden = begin + step
        h = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(chunks):
            channel = i * CHUNK + lane
            weight = tl.load(
                fc1_weight + channel[:, None] + hidden[None, :] * C,
                (channel < C)[:, None] & (hidden < HIDDEN)[None, :], 0.0,
            )  # fmt: skip
            h = add_product(normed[i], weight.to(dtype), h, PRECISION)
        if fc1_bias is not None:
            h += tl.load(fc1_bias + hidden, hidden < HIDDEN, 0.0).to(tl.float32)[None, :]
        g = gelu(h, dtype).to(dtype)
        added = ()
        for i in tl.static_range(chunks):
            channel = i * CHUNK + lane
            weight = tl.load(
                fc2_weight + hidden[:, None] + channel[None, :] * HIDDEN,
                (hidden < HIDDEN)[:, None] & (channel < C)[None, :], 0.0,
            )  # fmt: skip
            added = added + (add_product(g, weight.to(dtype), sums[i], PRECISION),)
        sums = added
    count = tl.minimum(positions - tile * ROWS, ROWS).to(tl.float32)
    if not PER_POSITION:
        partials += program.to(tl.int64) * (2 * C)
    for i in tl.static_range(chunks):
        channel = i * CHUNK + lane
        _finish(sums[i], x, stats, maps, fc2_bias, layer_scale_2, out, partials, channel, inside, count,
                row * C + channel[None, :], C, PER_POSITION, RESIDUAL)  # fmt: skip


@triton.jit(do_not_specialize=["positions"])
def _expand_kernel(
    x,  # tokens [B, N, C]
    hidden,  # out: [B, N, HIDDEN] in x's dtype
    maps,  # [B, 5, C] float32
    statistics,  # [B, N, 4] float32, or None
    fc1_weight,  # [HIDDEN, C]
    fc1_bias,  # [HIDDEN] or None
    positions,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_POSITION: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``gelu(W1 z + b1)``. The programs of one tile of rows follow each other, so that x comes from cache."""
    dtype = x.dtype.element_ty
    blocks: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    tiles = tl.cdiv(positions, ROWS)
    program = tl.program_id(0)
    tile_of_all, block = program // blocks, program % blocks
    image, tile = tile_of_all // tiles, tile_of_all % tiles
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, DEPTH)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = tile * ROWS + row < positions
    start = image.to(tl.int64) * positions + tile * ROWS
    x += start * C
    if PER_POSITION:
        statistics += start * 4
    else:
        maps += image.to(tl.int64) * (5 * C)
    stats = _load_statistics(maps, statistics, row, inside, C, PER_POSITION)
    h = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in tl.range(0, C, DEPTH, num_stages=STAGES):
        channel = begin + lane
        values = tl.load(x + row * C + channel[None, :], inside & (channel < C)[None, :], 0.0).to(tl.float32)
        weight = tl.load(
            fc1_weight + channel[:, None] + column[None, :] * C,
            (channel < C)[:, None] & (column < HIDDEN)[None, :], 0.0,
        )  # fmt: skip
        z = _normed(values, stats, maps, channel, C, PER_POSITION).to(dtype)
        h = add_product(z, weight.to(dtype), h, PRECISION)
    if fc1_bias is not None:
        h += tl.load(fc1_bias + column, column < HIDDEN, 0.0).to(tl.float32)[None, :]
    g = gelu(h, dtype).to(dtype)
    tl.store(hidden + start * HIDDEN + row * HIDDEN + column[None, :], g, inside & (column < HIDDEN)[None, :])


@triton.jit(do_not_specialize=["positions"])
def _project_kernel(
    hidden,  # [B, N, HIDDEN] in x's dtype
    x,  # tokens [B, N, C]
    out,  # tokens [B, N, C]; may be x
    partials,  # out: [B, tiles, 2, C] float32, not written with PER_POSITION
    maps,  # [B, 5, C] float32
    statistics,  # [B, N, 4] float32, or None
    fc2_weight,  # [C, HIDDEN]
    fc2_bias,  # [C] or None
    layer_scale_2,  # [C] or None
    positions,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_POSITION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y + ls2 * (W2 hidden + b2)`` and its moments."""
    dtype = x.dtype.element_ty
    blocks: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    tiles = tl.cdiv(positions, ROWS)
    program = tl.program_id(0)
    tile_of_all, block = program // blocks, program % blocks
    image, tile = tile_of_all // tiles, tile_of_all % tiles
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, DEPTH)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = tile * ROWS + row < positions
    start = image.to(tl.int64) * positions + tile * ROWS
    hidden += start * HIDDEN
    branch = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in tl.range(0, HIDDEN, DEPTH, num_stages=STAGES):
        at = begin + lane
        g = tl.load(hidden + row * HIDDEN + at[None, :], inside & (at < HIDDEN)[None, :], 0.0)
        weight = tl.load(
            fc2_weight + at[:, None] + channel[None, :] * HIDDEN,
            (at < HIDDEN)[:, None] & (channel < C)[None, :], 0.0,
        )  # fmt: skip
        branch = add_product(g, weight.to(dtype), branch, PRECISION)
    x += start * C
    out += start * C
    if PER_POSITION:
        statistics += start * 4
    else:
        maps += image.to(tl.int64) * (5 * C)
        partials += tile_of_all.to(tl.int64) * (2 * C)
    stats = _load_statistics(maps, statistics, row, inside, C, PER_POSITION)
    count = tl.minimum(positions - tile * ROWS, ROWS).to(tl.float32)
    _finish(branch, x, stats, maps, fc2_bias, layer_scale_2, out, partials, channel, inside, count,
            row * C + channel[None, :], C, PER_POSITION, RESIDUAL)  # fmt: skip


def problem_of(x: torch.Tensor, hidden: int) -> choice.BlockProblem:
    """What a block on tokens like ``x`` [B, C, H, W] has to compute; the batch is no part of it."""
    return choice.BlockProblem(x.shape[1], hidden, x.shape[2] * x.shape[3], x.dtype, architecture_of(x.device))


def _compute(
    x: torch.Tensor,
    out: torch.Tensor,
    moments: torch.Tensor | None,
    out_moments: torch.Tensor | None,
    p: BlockParameters,
) -> torch.Tensor | None:
    """The kernels of one block on channels-last ``x`` into ``out`` (which may be ``x``); returns the moments."""
    batch, channels, height, width = x.shape
    positions, hidden, device = height * width, p.fc1_weight.shape[0], x.device
    chosen = choice.choose_block(problem_of(x, hidden))
    fc1_weight, fc2_weight = matrix(p.fc1_weight), matrix(p.fc2_weight)
    fc1_bias, fc2_bias, layer_scale_2 = vector(p.fc1_bias), vector(p.fc2_bias), vector(p.layer_scale_2)
    maps, statistics = block_maps(x, moments, p)
    partials = None if p.per_position else tile_moments(x, chosen.rows)
    tiles = batch * triton.cdiv(positions, chosen.rows)
    shared = {"C": channels, "HIDDEN": hidden, "PER_POSITION": p.per_position, "PRECISION": precision(x.dtype)}
    if chosen.fused is not None:
        tile = chosen.fused
        launch(_fused_kernel, tiles, device, x, out, partials, maps, statistics, fc1_weight, fc1_bias, fc2_weight,
               fc2_bias, layer_scale_2, positions, **shared, ROWS=tile.rows, CHUNK=tile.chunk, BLOCK=tile.hidden,
               RESIDUAL=p.residual, STAGES=tile.stages, num_warps=tile.warps)  # fmt: skip
    else:
        expand, project = chosen.two_kernels
        between = torch.empty((batch, positions, hidden), dtype=x.dtype, device=device)
        programs = batch * triton.cdiv(positions, expand.rows) * triton.cdiv(hidden, expand.columns)
        launch(_expand_kernel, programs, device, x, between, maps, statistics, fc1_weight, fc1_bias, positions,
               **shared, ROWS=expand.rows, COLUMNS=expand.columns, DEPTH=expand.depth, STAGES=expand.stages,
               num_warps=expand.warps)  # fmt: skip
        launch(_project_kernel, tiles * triton.cdiv(channels, project.columns), device, between, x, out, partials, maps,
               statistics, fc2_weight, fc2_bias, layer_scale_2, positions, **shared, ROWS=project.rows,
               COLUMNS=project.columns, DEPTH=project.depth, RESIDUAL=p.residual, STAGES=project.stages,
               num_warps=project.warps)  # fmt: skip
    return None if partials is None else merge(partials, positions, chosen.rows, out_moments)


def _parameters(values: tuple[Any, ...]) -> BlockParameters:
    p = BlockParameters(*values)
    if p.int8:
        raise BackendError(
            "riformer::block: int8 is true, and Triton's kernels have no int8 products, only the CPU's have; leave it "
            "false"
        )
    return p


def block(x: torch.Tensor, moments: torch.Tensor | None, *parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``riformer::block``, see ``riformer_kernels.ops.block``."""
    p = _parameters(parameters)
    tokens, out = as_tokens(x), result_like(x, x.dtype)
    found = _compute(tokens, out, None if p.per_position else dense_moments(moments), None, p) if x.shape[0] else None
    if found is None:
        found = torch.empty((x.shape[0], 2, 0 if p.per_position else x.shape[1]), dtype=torch.float32, device=x.device)
    return in_layout_of(out, x), found


def block_(x: torch.Tensor, moments: torch.Tensor | None, *parameters: Any) -> None:
    """``riformer::block_``: the same over ``x`` and ``moments``."""
    if not x.shape[0]:
        return
    p = _parameters(parameters)
    tokens, dense = as_tokens(x), None if p.per_position else dense_moments(moments)
    _compute(tokens, tokens, dense, dense, p)
    if tokens.data_ptr() != x.data_ptr():
        x.copy_(tokens)
    if moments is not None and dense is not None and dense.data_ptr() != moments.data_ptr():
        moments.copy_(dense)
