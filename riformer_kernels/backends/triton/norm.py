"""``norm`` on the GPU: the norm of a feature map, its statistics from the moments or from each position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import as_tokens, block_of, dense_moments, in_layout_of, launch, result_like, rows_of, vector
from ._math import centred_statistics, load_moments, normed_rows, position_statistics


@triton.jit(do_not_specialize=["positions", "eps"])
def _norm_kernel(
    x,  # tokens [B, N, C]
    moments,  # [B, 2, C] float32, not read with PER_POSITION
    weight,  # [C]
    bias,  # [C]
    out,  # tokens [B, N, C]
    positions,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    PER_POSITION: tl.constexpr,
):
    tiles = tl.cdiv(positions, ROWS)
    program = tl.program_id(0)
    image, tile = program // tiles, program % tiles
    row = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK_C)
    there = (tile * ROWS + row < positions) & (c < C)[None, :]
    start = (image.to(tl.int64) * positions + tile * ROWS) * C
    values = tl.load(x + start + row * C + c[None, :], there, 0.0).to(tl.float32)
    if PER_POSITION:
        _, rstd, d = position_statistics(values, eps, C, BLOCK_C)
    else:
        mean, centred, first = load_moments(moments, image, C, BLOCK_C)
        mu, low, rstd, _ = centred_statistics(mean, centred, first, positions, eps, C, BLOCK_C)
        d = (values - mu) - low
    result = normed_rows(d, rstd, weight, bias, c, C)
    tl.store(out + start + row * C + c[None, :], result.to(out.dtype.element_ty), there)


def norm(
    x: torch.Tensor,
    moments: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    per_position: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``riformer::norm``, see ``riformer_kernels.ops.norm``."""
    tokens, out = as_tokens(x), result_like(x, dtype)
    batch, channels, height, width = x.shape
    if batch:
        moments = None if per_position else dense_moments(moments)
        rows = rows_of(channels)
        launch(_norm_kernel, batch * triton.cdiv(height * width, rows), x.device, tokens, moments, vector(weight),
               vector(bias), out, height * width, eps, C=channels, BLOCK_C=block_of(channels), ROWS=rows,
               PER_POSITION=per_position, num_warps=4)  # fmt: skip
    return in_layout_of(out, x)
