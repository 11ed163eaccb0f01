"""Device functions that the kernels share: GELU, statistics from moments, moments of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

# Phi(v) = 1/2 + v P(v^2) on [-4.4, 4.4]; the coefficients and their error (2.5e-5) are those of csrc/common/gelu.h.
PHI_CLAMP = tl.constexpr(4.4)
PHI_0 = tl.constexpr(0.39876160147160244)
PHI_1 = tl.constexpr(-0.06607642473899802)
PHI_2 = tl.constexpr(0.009643025689081848)
PHI_3 = tl.constexpr(-0.0010549918775998287)
PHI_4 = tl.constexpr(8.429291885769224e-05)
PHI_5 = tl.constexpr(-4.724859371783133e-06)
PHI_6 = tl.constexpr(1.7408427003910305e-07)
PHI_7 = tl.constexpr(-3.75403611738265e-09)
PHI_8 = tl.constexpr(3.569414252016512e-11)


@triton.jit
def gelu(x, RESULT: tl.constexpr):
    """``x Phi(x)`` for a result in the dtype RESULT. Through erf for float32; by the polynomial for 16 bits, whose
    rounding is coarser than its error, at about half the instructions."""
    if tl.float32 == RESULT:
        phi = 0.5 * tl.math.erf(x * 0.7071067811865476) + 0.5
    else:
        tl.static_assert((tl.bfloat16 == RESULT) or (tl.float16 == RESULT), "gelu has no form for this dtype")
        v = tl.minimum(tl.maximum(x, -PHI_CLAMP), PHI_CLAMP)
        s = v * v
        p = PHI_8 * s + PHI_7
        p = p * s + PHI_6
        p = p * s + PHI_5
        p = p * s + PHI_4
        p = p * s + PHI_3
        p = p * s + PHI_2
        p = p * s + PHI_1
        p = p * s + PHI_0
        phi = v * p + 0.5
    return x * phi


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr):
    """``total + a b``, float32.

    Exact float32 products are summed on their own first: one chain of additions over all of K (3072 at the widest)
    has more error than PyTorch's, which adds pieces. The zero that they start from is one that the compiler cannot
    know to be one; otherwise it puts ``total`` in its place and makes a single chain after all.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        zero = (tl.program_id(0) < 0).to(tl.float32)
        result = total + tl.dot(a, b, tl.zeros_like(total) + zero, input_precision="ieee")
    else:
        result = tl.dot(a, b, total, input_precision=PRECISION)
    return result


@triton.jit
def load_moments(moments, image, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Means and centred sums of squares [BLOCK_C] of one image, 0 beyond C, and the first channel's mean."""
    c = tl.arange(0, BLOCK_C)
    base = moments + image.to(tl.int64) * (2 * C)
    return tl.load(base + c, c < C, 0.0), tl.load(base + C + c, c < C, 0.0), tl.load(base)


@triton.jit
def centred_statistics(mean, centred, first, positions, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Statistics over C x N of one image from its moments.

    Sums run over differences from ``first``, a value among the means: nothing cancels where the mean is much larger
    than the deviation.

    Returns:
        mu and what its rounding to float32 left out, rstd, and the means minus mu ([BLOCK_C], 0 beyond C).
    """
    inside = tl.arange(0, BLOCK_C) < C
    d = tl.where(inside, mean - first, 0.0)
    shift = tl.sum(d, 0) / C
    d = tl.where(inside, d - shift, 0.0)
    total = tl.sum(centred, 0) + positions * tl.sum(d * d, 0)
    mu = first + shift
    # One number per image: in float64, its four roundings become one.
    variance = total.to(tl.float64) / (positions.to(tl.float64) * C)
    return mu, shift - (mu - first), (1.0 / tl.sqrt(variance + eps)).to(tl.float32), d


@triton.jit
def position_statistics(values, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm's statistics of float32 ``values`` [rows, BLOCK_C], taken about the first channel.

    Returns:
        mean and rstd [rows, 1], and the values minus the mean (0 beyond C).
    """
    c = tl.arange(0, BLOCK_C)[None, :]
    first = tl.sum(tl.where(c == 0, values, 0.0), 1)[:, None]
    d = tl.where(c < C, values - first, 0.0)
    shift = tl.sum(d, 1)[:, None] / C
    d = tl.where(c < C, d - shift, 0.0)
    return first + shift, 1.0 / tl.sqrt_rn(tl.sum(d * d, 1)[:, None] / C + eps), d


@triton.jit
def normed_rows(centred, rstd, weight, bias, c, C: tl.constexpr):
    """``centred rstd weight + bias`` for float32 [rows, channels]."""
    gamma = tl.load(weight + c, c < C, 0.0).to(tl.float32)[None, :]
    beta = tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
    return centred * (rstd * gamma) + beta


@triton.jit
def store_tile_moments(partials, values, inside, count, channel, C: tl.constexpr):
    """Write the moments of a tile ``values`` [rows, channels] (float32), of whose rows ``inside`` [rows, 1] count.

    Args:
        partials: where this tile's [2, C] lie.
        count: the rows that count, float32.
        channel: [channels].
    """
    mean = tl.sum(tl.where(inside, values, 0.0), 0) / count
    d = tl.where(inside, values - mean[None, :], 0.0)
    # The mean's own rounding error, which matters where the mean is large: one more sum corrects both results.
    shift = tl.sum(d, 0) / count
    centred = tl.sum(d * d, 0) - count * shift * shift
    tl.store(partials + channel, mean + shift, channel < C)
    tl.store(partials + C + channel, tl.maximum(centred, 0.0, propagate_nan=tl.PropagateNan.ALL), channel < C)
