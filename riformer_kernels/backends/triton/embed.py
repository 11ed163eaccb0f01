"""``embed`` on the GPU: the stem and the downsamplings as implicit matrix products with a moments epilogue.

The sum runs over (tap, input channel). Few input channels (the stem: 147 terms) are gathered term by term in the
order that the weight has in memory; from 16 on, each step of the sum is a slice of the channels at one tap, contiguous
in channels_last tokens. That order needs the weight as [C, KH, KW, Cin]. Where the parameter lies otherwise (PyTorch's
default), ``_reorder_kernel`` writes it anew in every call: nothing is kept that could grow stale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...errors import InputError
from . import choice
from ._launch import MOST_ELEMENTS, aligned, architecture_of, launch, precision, vector
from ._math import add_product, store_tile_moments
from .moments import merge, tile_moments

GATHERED_CHANNELS = 16
REORDERED = 1024


@triton.jit
def _reorder_kernel(
    weight,  # [C, Cin, KH, KW], contiguous
    out,  # [C, KH, KW, Cin]
    CIN: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One output channel and BLOCK of its terms per program."""
    blocks: tl.constexpr = (CIN * TAPS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    base = (program // blocks).to(tl.int64) * (CIN * TAPS)
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < CIN * TAPS
    tl.store(out + base + at, tl.load(weight + base + (at % CIN) * TAPS + at // CIN, inside, 0.0), inside)


@triton.jit(do_not_specialize=["height", "width", "out_width", "positions"])
def _conv_kernel(
    x,  # images [B, CIN, H, W] with any strides
    weight,  # [C, CIN, KH, KW] with GATHER, else [C, KH, KW, CIN]; contiguous
    bias,  # [C] or None
    out,  # tokens [B, N, C]
    partials,  # out: [B, tiles, 2, C] float32, or None
    height,
    width,
    out_width,
    positions,  # N = OH * OW
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    CIN: tl.constexpr,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    dtype = out.dtype.element_ty
    terms: tl.constexpr = CIN * KH * KW
    slices: tl.constexpr = (CIN + DEPTH - 1) // DEPTH
    blocks: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    tiles = tl.cdiv(positions, ROWS)
    program = tl.program_id(0)
    tile_of_all, block = program // blocks, program % blocks
    image, tile = tile_of_all // tiles, tile_of_all % tiles
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, DEPTH)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    position = tile * ROWS + row
    inside = position < positions
    top = position // out_width * STRIDE - PADDING
    left = position % out_width * STRIDE - PADDING
    x += image.to(tl.int64) * stride_image
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if GATHER:
        for begin in tl.range(0, terms, DEPTH, num_stages=STAGES):
            term = begin + lane
            ci, tap = term // (KH * KW), term % (KH * KW)
            y, z = top + (tap // KW)[None, :], left + (tap % KW)[None, :]
            there = inside & (term < terms)[None, :] & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            values = tl.load(x + ci[None, :] * stride_channel + y * stride_row + z * stride_column, there, 0.0)
            matrix = tl.load(
                weight + term[:, None] + channel[None, :] * terms,
                (term < terms)[:, None] & (channel < C)[None, :], 0.0,
            )  # fmt: skip
            total = add_product(values.to(dtype), matrix.to(dtype), total, PRECISION)
    else:
        for step in tl.range(0, KH * KW * slices, num_stages=STAGES):
            tap = step // slices
            ci = (step % slices) * DEPTH + lane
            y, z = top + tap // KW, left + tap % KW
            there = inside & (y >= 0) & (y < height) & (z >= 0) & (z < width) & (ci < CIN)[None, :]
            values = tl.load(x + ci[None, :] * stride_channel + (y * stride_row + z * stride_column), there, 0.0)
            matrix = tl.load(
                weight + tap * CIN + ci[:, None] + channel[None, :] * terms,
                (ci < CIN)[:, None] & (channel < C)[None, :], 0.0,
            )  # fmt: skip
            total = add_product(values.to(dtype), matrix.to(dtype), total, PRECISION)
    if bias is not None:
        total += tl.load(bias + channel, channel < C, 0.0).to(tl.float32)[None, :]
    rounded = total.to(dtype)
    base = out + (image.to(tl.int64) * positions + tile * ROWS) * C
    tl.store(base + row * C + channel[None, :], rounded, inside & (channel < C)[None, :])
    if partials is not None:
        count = tl.minimum(positions - tile * ROWS, ROWS).to(tl.float32)
        target = partials + tile_of_all.to(tl.int64) * (2 * C)
        store_tile_moments(target, rounded.to(tl.float32), inside, count, channel, C)


def _by_taps(weight: torch.Tensor) -> torch.Tensor:
    """The weight [C, Cin, KH, KW] as [C, KH, KW, Cin] in memory: itself when channels_last, else written anew."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    weight = weight.contiguous()
    channels, inputs, height, width = weight.shape
    out = torch.empty((channels, height, width, inputs), dtype=weight.dtype, device=weight.device)
    programs = channels * triton.cdiv(inputs * height * width, REORDERED)
    launch(_reorder_kernel, programs, weight.device, weight, out, CIN=inputs, TAPS=height * width, BLOCK=REORDERED,
           num_warps=4)  # fmt: skip
    return out


def embed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    moments: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``riformer::embed``, see ``riformer_kernels.ops.embed``."""
    batch, inputs, height, width = x.shape
    channels, _, kernel_height, kernel_width = weight.shape
    out_height = (height + 2 * padding - kernel_height) // stride + 1
    out_width = (width + 2 * padding - kernel_width) // stride + 1
    positions = out_height * out_width
    shape = (batch, channels, out_height, out_width)
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if not batch:
        return out, torch.empty((0, 2, channels if moments else 0), dtype=torch.float32, device=x.device)
    reach = sum((size - 1) * abs(step) for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))
    if max(reach, channels * positions) > MOST_ELEMENTS:
        raise InputError(f"one image [{inputs}, {height}, {width}] is more than 32-bit offsets reach; use smaller ones")
    gather = inputs < GATHERED_CHANNELS
    if not gather and x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    x, weight, bias = aligned(x), weight.contiguous() if gather else _by_taps(weight), vector(bias)
    problem = choice.EmbedProblem(inputs, channels, positions, dtype, architecture_of(x.device))
    tile = choice.choose_embed(problem)
    partials = tile_moments(out, tile.rows) if moments else None
    programs = batch * triton.cdiv(positions, tile.rows) * triton.cdiv(channels, tile.columns)
    launch(_conv_kernel, programs, x.device, x, weight, bias, out, partials, height, width, out_width, positions,
           *x.stride(), CIN=inputs, C=channels, KH=kernel_height, KW=kernel_width, STRIDE=stride, PADDING=padding,
           GATHER=gather, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, PRECISION=precision(dtype),
           STAGES=tile.stages, num_warps=tile.warps)  # fmt: skip
    if partials is None:
        return out, torch.empty((batch, 2, 0), dtype=torch.float32, device=x.device)
    return out, merge(partials, positions, tile.rows)
