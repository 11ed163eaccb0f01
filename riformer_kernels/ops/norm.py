"""``norm``: the norm of a feature map at one of ``out_indices``, its statistics taken from the moments."""

from __future__ import annotations

import torch

from .. import algebra
from ._library import Op, memory_format_of, needed, working_dtype

SCHEMA = (
    "(Tensor x, Tensor? moments, Tensor weight, Tensor bias, float eps, bool per_position, ScalarType dtype) -> Tensor"
)


def reference(
    x: torch.Tensor,
    moments: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    per_position: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """GroupNorm(1) from ``moments`` [B, 2, C], or LayerNorm per position, of tokens ``x`` [B, C, H, W].

    Returns:
        [B, C, H, W] in ``dtype`` and in ``x``'s memory format.
    """
    work = working_dtype(x.dtype)
    if per_position:
        out = algebra.position_norm(x.to(work), weight.to(work), bias.to(work), eps)
    else:
        out = algebra.group_norm(x.to(work), needed(moments).to(work), weight.to(work), bias.to(work), eps)
    return out.to(dtype).contiguous(memory_format=memory_format_of(x))


def fake(
    x: torch.Tensor,
    moments: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    per_position: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=memory_format_of(x))


OP = Op("norm", SCHEMA, reference=reference, fake=fake)
