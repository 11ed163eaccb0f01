"""``head``: final norm, global average pooling and the classifier, from the moments alone where the norm allows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import algebra
from ._library import Op, needed, working_dtype

SCHEMA = (
    "(Tensor x, Tensor? moments, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc_weight, Tensor? fc_bias,"
    " bool per_position, ScalarType dtype) -> Tensor"
)


def reference(
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
    """Class scores ``fc(avgpool(norm(x)))``.

    GroupNorm(1): the pooled, normed feature of channel c is (m_c - mu) r gamma_c + beta_c, so ``x`` itself is not
    read. LayerNorm per position has no such form and reads ``x``.

    Args:
        x: last tokens [B, C, H, W].
        moments: [B, 2, C], or None with ``per_position``.
        fc_weight, fc_bias: [classes, C] and [classes].

    Returns:
        [B, classes] in ``dtype``.
    """
    work = working_dtype(x.dtype)
    weight, bias = norm_weight.to(work), norm_bias.to(work)
    if per_position:
        pooled = algebra.position_norm(x.to(work), weight, bias, eps).mean(dim=(2, 3))
    else:
        moments = needed(moments).to(work)
        mu, rstd = algebra.group_statistics(moments, x.shape[2] * x.shape[3], eps)
        pooled = (moments[:, 0] - mu) * rstd * weight + bias
    return F.linear(pooled, fc_weight.to(work), None if fc_bias is None else fc_bias.to(work)).to(dtype)


def fake(
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
    return x.new_empty((x.shape[0], fc_weight.shape[0]), dtype=dtype)


OP = Op("head", SCHEMA, reference=reference, fake=fake)
