"""``embed``: the stem and the downsampling convolutions, with the moments of what they write."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import algebra
from ._library import Op, token_format, working_dtype

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, ScalarType dtype, bool moments)"
    " -> (Tensor, Tensor)"
)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    moments: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolution with square stride and padding, and the moments of its output.

    Args:
        x: images [B, Cin, H, W].
        weight: [C, Cin, KH, KW].
        bias: [C] or None.
        stride, padding: the same in both directions.
        dtype: dtype of the output tokens.
        moments: whether to compute the moments.

    Returns:
        tokens [B, C, OH, OW] in ``dtype``, in the device's token layout whatever that of ``x`` is, and moments
        [B, 2, C] in float32 ([B, 2, 0] when not asked for).
    """
    work = working_dtype(dtype)
    bias = None if bias is None else bias.to(work)
    out = F.conv2d(x.to(work), weight.to(work), bias, stride, padding).to(dtype)
    out = out.contiguous(memory_format=token_format(x.device))
    if moments:
        return out, algebra.moments_of(out.to(work))
    return out, out.new_empty((out.shape[0], 2, 0), dtype=work)


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    moments: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    height = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    width = (x.shape[3] + 2 * padding - weight.shape[3]) // stride + 1
    shape = (x.shape[0], weight.shape[0], height, width)
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=token_format(x.device))
    channels = weight.shape[0] if moments else 0
    return out, x.new_empty((x.shape[0], 2, channels), dtype=working_dtype(dtype))


OP = Op("embed", SCHEMA, reference=reference, fake=fake)
