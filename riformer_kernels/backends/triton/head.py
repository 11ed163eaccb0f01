"""``head`` on the GPU: final norm, average pooling and classifier, from the moments alone where the norm allows it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import as_tokens, block_of, dense_moments, launch, matrix, rows_of, vector
from ._math import centred_statistics, load_moments, normed_rows, position_statistics

CLASSES = 32


@triton.jit(do_not_specialize=["positions", "eps"])
def _pool_kernel(
    x,  # tokens [B, N, C]
    weight,  # [C]
    bias,  # [C]
    sums,  # out: [B, tiles, C] float32, sums over the rows of each tile
    positions,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """LayerNorm per position, summed over the positions of a tile."""
    tiles = tl.cdiv(positions, ROWS)
    program = tl.program_id(0)
    image, tile = program // tiles, program % tiles
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK_C)
    inside = tile * ROWS + row < positions
    start = (image.to(tl.int64) * positions + tile * ROWS) * C
    values = tl.load(x + start + row * C + c[None, :], inside & (c < C)[None, :], 0.0).to(tl.float32)
    _, rstd, d = position_statistics(values, eps, C, BLOCK_C)
    result = tl.where(inside, normed_rows(d, rstd, weight, bias, c, C), 0.0)
    tl.store(sums + program.to(tl.int64) * C + c, tl.sum(result, 0), c < C)


@triton.jit(do_not_specialize=["positions", "eps", "tiles", "classes"])
def _head_kernel(
    moments,  # [B, 2, C] float32; with PER_POSITION the sums [B, tiles, C] of ``_pool_kernel``
    weight,  # [C] of the norm, not read with PER_POSITION
    bias,  # [C]
    fc_weight,  # [classes, C]
    fc_bias,  # [classes] or None
    out,  # [B, classes]
    positions,
    eps,
    tiles,
    classes,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CLASSES: tl.constexpr,
    PER_POSITION: tl.constexpr,
):
    """CLASSES scores of one image: pooled channel c is (m_c - mu) r gamma_c + beta_c."""
    blocks = tl.cdiv(classes, CLASSES)
    program = tl.program_id(0)
    image, block = program // blocks, program % blocks
    c = tl.arange(0, BLOCK_C)
    if PER_POSITION:
        pooled = tl.zeros((BLOCK_C,), tl.float32)
        base = moments + image.to(tl.int64) * tiles * C + c
        for tile in range(tiles):
            pooled += tl.load(base + tile * C, c < C, 0.0)
        pooled = pooled / positions
    else:
        mean, centred, first = load_moments(moments, image, C, BLOCK_C)
        _, _, rstd, d = centred_statistics(mean, centred, first, positions, eps, C, BLOCK_C)
        gamma = tl.load(weight + c, c < C, 0.0).to(tl.float32)
        beta = tl.load(bias + c, c < C, 0.0).to(tl.float32)
        pooled = d * (rstd * gamma) + beta
    scored = block * CLASSES + tl.arange(0, CLASSES)
    there = (scored < classes)[:, None] & (c < C)[None, :]
    rows = tl.load(fc_weight + scored.to(tl.int64)[:, None] * C + c[None, :], there, 0.0).to(tl.float32)
    scores = tl.sum(tl.where(there, rows * pooled[None, :], 0.0), 1)
    if fc_bias is not None:
        scores += tl.load(fc_bias + scored, scored < classes, 0.0).to(tl.float32)
    target = out + image.to(tl.int64) * classes + scored
    tl.store(target, scores.to(out.dtype.element_ty), scored < classes)


def head(
    x: torch.Tensor,
    moments: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    fc_weight: torch.Tensor,
    fc_bias: torch.Tensor | None,
    per_position: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``riformer::head``, see ``riformer_kernels.ops.head``."""
    batch, channels, height, width = x.shape
    classes, positions, device = fc_weight.shape[0], height * width, x.device
    out = torch.empty((batch, classes), dtype=dtype, device=device)
    if not out.numel():
        return out
    norm_weight, norm_bias = vector(norm_weight), vector(norm_bias)
    rows, block = rows_of(channels), block_of(channels)
    tiles = triton.cdiv(positions, rows)
    if per_position:
        source = torch.empty((batch, tiles, channels), dtype=torch.float32, device=device)
        launch(_pool_kernel, batch * tiles, device, as_tokens(x), norm_weight, norm_bias, source, positions, eps,
               C=channels, BLOCK_C=block, ROWS=rows, num_warps=4)  # fmt: skip
    else:
        source = dense_moments(moments)
    launch(_head_kernel, batch * triton.cdiv(classes, CLASSES), device, source, norm_weight, norm_bias,
           matrix(fc_weight), vector(fc_bias), out, positions, eps, tiles, classes, C=channels, BLOCK_C=block,
           CLASSES=CLASSES, PER_POSITION=per_position, num_warps=8)  # fmt: skip
    return out
