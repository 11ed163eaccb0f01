"""What a block does to its tokens before the first product, as numbers per image and channel.

With xc = x - mu1 (mu1: the image's mean, or the position's with LayerNorm), each image needs four numbers a channel:

    y = x + u xc + w          u = r1 ls1 gamma1',  w = ls1 beta1'
    z = P xc + Q              P = (1 + u) r2 gamma2,  Q = (w - (mu2 - mu1)) r2 gamma2 + beta2

mu2 and r2, the statistics of y, follow from the moments of x (see ``riformer_kernels.algebra``). Everything is taken
relative to mu1, so nothing cancels where the mean is large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...ops.block import BlockParameters
from ._launch import block_of, launch, rows_of, vector
from ._math import centred_statistics, load_moments, position_statistics


@triton.jit
def _folded(norm1_weight, norm1_bias, affine_weight, affine_bias, c, C: tl.constexpr):
    """gamma' = gamma (s - 1), beta' = beta (s - 1) + t in float32; as they are for a deployed block (no affine)."""
    gamma = tl.load(norm1_weight + c, c < C, 0.0).to(tl.float32)
    beta = tl.load(norm1_bias + c, c < C, 0.0).to(tl.float32)
    if affine_weight is not None:
        difference = tl.load(affine_weight + c, c < C, 0.0).to(tl.float32) - 1.0
        gamma = gamma * difference
        beta = beta * difference
        if affine_bias is not None:
            beta += tl.load(affine_bias + c, c < C, 0.0).to(tl.float32)
    return gamma, beta


@triton.jit(do_not_specialize=["positions", "eps1", "eps2"])
def _prepare_kernel(
    moments,  # [B, 2, C] float32, not read with PER_POSITION
    maps,  # out: [B, 5, C] float32: u, w, P, Q, and mu1 in every place; [1, 5, C] with PER_POSITION
    layer_scale_1,  # [C] or None, and the four after it
    norm1_weight,
    norm1_bias,
    affine_weight,
    affine_bias,
    norm2_weight,  # [C]
    norm2_bias,  # [C]
    positions,
    eps1,
    eps2,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PER_POSITION: tl.constexpr,
):
    """One image; with PER_POSITION once for all: u = ls1 gamma1', w = ls1 beta1', P = gamma2, Q = beta2."""
    image = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    gamma2 = tl.load(norm2_weight + c, c < C, 0.0).to(tl.float32)
    beta2 = tl.load(norm2_bias + c, c < C, 0.0).to(tl.float32)
    u = tl.zeros((BLOCK_C,), tl.float32)
    w = tl.zeros((BLOCK_C,), tl.float32)
    if norm1_weight is not None:
        scale = tl.load(layer_scale_1 + c, c < C, 0.0).to(tl.float32)
        gamma, beta = _folded(norm1_weight, norm1_bias, affine_weight, affine_bias, c, C)
        u = scale * gamma
        w = scale * beta
    target = maps + image.to(tl.int64) * (5 * C) + c
    if PER_POSITION:
        tl.store(target + 2 * C, gamma2, c < C)
        tl.store(target + 3 * C, beta2, c < C)
    else:
        mean, centred, first = load_moments(moments, image, C, BLOCK_C)
        mu, low, rstd, d = centred_statistics(mean, centred, first, positions, eps1, C, BLOCK_C)
        u = u * rstd
        # Of y, relative to mu: means d (1 + u) + w, centred sums (1 + u)^2 V.
        gain = 1.0 + u
        shifted = tl.where(c < C, d * gain + w, 0.0)
        mu2, _, rstd2, _ = centred_statistics(
            shifted, gain * gain * centred, tl.sum(shifted, 0) / C, positions, eps2, C, BLOCK_C
        )
        p = rstd2 * gamma2
        tl.store(target + 2 * C, gain * p, c < C)
        # The kernels subtract the rounded mu; what that leaves over is made up for in the constants.
        tl.store(target + 3 * C, ((w - mu2) - low * gain) * p + beta2, c < C)
        tl.store(target + 4 * C, tl.zeros((BLOCK_C,), tl.float32) + mu, c < C)
        w -= low * u
    tl.store(target, u, c < C)
    tl.store(target + C, w, c < C)


@triton.jit(do_not_specialize=["positions", "eps1", "eps2"])
def _position_kernel(
    x,  # tokens [B, N, C]
    statistics,  # out: [B, N, 4] float32: mean and rstd of x, mean of y relative to that of x, rstd of y
    maps,  # [1, 5, C] float32 of ``_prepare_kernel``
    positions,
    eps1,
    eps2,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """LayerNorm's statistics: of each position of x, and of y = x + u (x - mean) rstd + w."""
    tiles = tl.cdiv(positions, ROWS)
    program = tl.program_id(0)
    image, tile = program // tiles, program % tiles
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (tile * ROWS + row < positions) & (c < C)
    start = image.to(tl.int64) * positions + tile * ROWS
    values = tl.load(x + start * C + row * C + c, inside, 0.0).to(tl.float32)
    mean, rstd, d = position_statistics(values, eps1, C, BLOCK_C)
    u = tl.load(maps + c, c < C, 0.0)
    w = tl.load(maps + C + c, c < C, 0.0)
    y = tl.where(c < C, d + u * (d * rstd) + w, 0.0)
    mean2, rstd2, _ = position_statistics(y, eps2, C, BLOCK_C)
    target = statistics + start * 4 + row * 4
    there = tile * ROWS + row < positions
    tl.store(target, mean, there)
    tl.store(target + 1, rstd, there)
    tl.store(target + 2, mean2, there)
    tl.store(target + 3, rstd2, there)


def block_maps(
    x: torch.Tensor, moments: torch.Tensor | None, p: BlockParameters
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The maps of a block on channels-last ``x`` [B, C, H, W] with ``moments`` [B, 2, C].

    Returns:
        float32 [B, 5, C] (u, w, P, Q, and mu1 in every place) and None. With ``per_position`` [1, 5, C]
        (u = ls1 gamma1', w = ls1 beta1', P = gamma2, Q = beta2) and the statistics [B, N, 4] of each position.
    """
    batch, channels, height, width = x.shape
    positions, device = height * width, x.device
    first_half = [
        vector(value) for value in (p.layer_scale_1, p.norm1_weight, p.norm1_bias, p.affine_weight, p.affine_bias)
    ]
    images = 1 if p.per_position else batch
    maps = torch.empty((images, 5, channels), dtype=torch.float32, device=device)
    launch(_prepare_kernel, images, device, moments, maps, *first_half, vector(p.norm2_weight), vector(p.norm2_bias),
           positions, p.eps1, p.eps2, C=channels, BLOCK_C=block_of(channels), PER_POSITION=p.per_position,
           num_warps=4)  # fmt: skip
    if not p.per_position:
        return maps, None
    statistics = torch.empty((batch, positions, 4), dtype=torch.float32, device=device)
    rows = rows_of(channels)
    launch(_position_kernel, batch * triton.cdiv(positions, rows), device, x, statistics, maps, positions, p.eps1,
           p.eps2, C=channels, BLOCK_C=block_of(channels), ROWS=rows, num_warps=4)  # fmt: skip
    return maps, statistics
