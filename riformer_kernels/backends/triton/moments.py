"""``moments`` on the GPU, and the merge of tile moments that every kernel with a moments epilogue is followed by."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import as_tokens, launch
from ._math import store_tile_moments

ROWS = 64
CHANNELS = 64
MERGED_CHANNELS = 64
MERGED_TILES = 16


@triton.jit(do_not_specialize=["positions"])
def _tile_kernel(
    x,  # tokens [B, N, C]
    partials,  # [B, tiles, 2, C] float32
    positions,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(positions, ROWS)
    chunks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    tile_of_all, chunk = program // chunks, program % chunks
    image, tile = tile_of_all // tiles, tile_of_all % tiles
    row = tl.arange(0, ROWS)[:, None]
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)
    inside = tile * ROWS + row < positions
    base = x + (image.to(tl.int64) * positions + tile * ROWS) * C
    values = tl.load(base + row * C + channel[None, :], inside & (channel < C)[None, :], 0.0).to(tl.float32)
    count = tl.minimum(positions - tile * ROWS, ROWS).to(tl.float32)
    store_tile_moments(partials + tile_of_all.to(tl.int64) * (2 * C), values, inside, count, channel, C)


@triton.jit(do_not_specialize=["positions"])
def _merge_kernel(
    partials,  # [B, tiles, 2, C] float32: mean and centred sum of squares of each tile of ROWS positions
    moments,  # [B, 2, C] float32
    positions,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Chan et al.'s merge in two passes over the tiles, in an order that depends on N alone:
    m = sum n_t m_t / N,  V = sum V_t + n_t (m_t - m)^2."""
    tiles = tl.cdiv(positions, ROWS)
    chunks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    image, chunk = program // chunks, program % chunks
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    base = partials + image.to(tl.int64) * tiles * (2 * C) + channel
    step = tl.arange(0, TILES)[:, None]
    # Differences from the first tile's mean: a large common mean takes no digits away.
    first = tl.load(base, channel < C, 0.0)
    total = tl.zeros((TILES, CHANNELS), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + step
        inside = (tile < tiles) & (channel < C)
        mean = tl.load(base + tile.to(tl.int64) * (2 * C), inside, 0.0)
        count = tl.minimum(positions - tile * ROWS, ROWS).to(tl.float32)
        total += tl.where(inside, count * (mean - first), 0.0)
    shift = tl.sum(total, 0)[None, :] / positions
    total = tl.zeros((TILES, CHANNELS), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + step
        inside = (tile < tiles) & (channel < C)
        mean = tl.load(base + tile.to(tl.int64) * (2 * C), inside, 0.0)
        centred = tl.load(base + tile.to(tl.int64) * (2 * C) + C, inside, 0.0)
        count = tl.minimum(positions - tile * ROWS, ROWS).to(tl.float32)
        d = (mean - first) - shift
        total += tl.where(inside, centred + count * d * d, 0.0)
    target = moments + image.to(tl.int64) * (2 * C) + channel
    tl.store(target, first + shift, channel < C)
    tl.store(target + C, tl.sum(total, 0)[None, :], channel < C)


def tile_moments(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Where a kernel with tiles of ``rows`` positions of tokens like ``x`` [B, C, H, W] leaves their moments:
    [B, tiles, 2, C] float32."""
    tiles = triton.cdiv(x.shape[2] * x.shape[3], rows)
    return torch.empty((x.shape[0], tiles, 2, x.shape[1]), dtype=torch.float32, device=x.device)


def merge(partials: torch.Tensor, positions: int, rows: int, moments: torch.Tensor | None = None) -> torch.Tensor:
    """Moments [B, 2, C] from those of tiles of ``rows`` positions, into ``moments`` where given."""
    batch, _, _, channels = partials.shape
    if moments is None:
        moments = torch.empty((batch, 2, channels), dtype=torch.float32, device=partials.device)
    if batch:
        programs = batch * triton.cdiv(channels, MERGED_CHANNELS)
        launch(_merge_kernel, programs, partials.device, partials, moments, positions, C=channels, ROWS=rows,
               CHANNELS=MERGED_CHANNELS, TILES=MERGED_TILES, num_warps=4)  # fmt: skip
    return moments


def moments(x: torch.Tensor) -> torch.Tensor:
    """``riformer::moments``, see ``riformer_kernels.ops.moments``."""
    tokens = as_tokens(x)
    batch, channels, height, width = x.shape
    partials = tile_moments(tokens, ROWS)
    if batch:
        programs = batch * partials.shape[1] * triton.cdiv(channels, CHANNELS)
        launch(_tile_kernel, programs, x.device, tokens, partials, height * width, C=channels, ROWS=ROWS,
               CHANNELS=CHANNELS, num_warps=4)  # fmt: skip
    return merge(partials, height * width, ROWS)
