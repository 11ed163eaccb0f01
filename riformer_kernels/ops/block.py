"""``block``: a whole RIFormer block, and with its first half left out the LN-1x1 unit of the paper.

y   = x + ls1 * (gamma1' norm1(x) + beta1')          gamma1', beta1': the token mixer's affine folded in
out = y + ls2 * (W2 gelu(W1 norm2(y) + b1) + b2)     (RIFormer, arXiv 2304.05659, section 3.3)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import algebra
from ._library import Op, memory_format_of, working_dtype

_PARAMETERS = (
    "Tensor? layer_scale_1, Tensor? norm1_weight, Tensor? norm1_bias, Tensor? affine_weight, Tensor? affine_bias,"
    " float eps1, Tensor norm2_weight, Tensor norm2_bias, float eps2, Tensor fc1_weight, Tensor? fc1_bias,"
    " Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale_2, bool per_position, bool residual"
)
SCHEMA = f"(Tensor x, Tensor? moments, {_PARAMETERS}) -> (Tensor, Tensor)"
IN_PLACE_SCHEMA = f"(Tensor(a!) x, Tensor(b!)? moments, {_PARAMETERS}) -> ()"


def reference(
    x: torch.Tensor,
    moments: torch.Tensor | None,
    layer_scale_1: torch.Tensor | None,
    norm1_weight: torch.Tensor | None,
    norm1_bias: torch.Tensor | None,
    affine_weight: torch.Tensor | None,
    affine_bias: torch.Tensor | None,
    eps1: float,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    eps2: float,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    layer_scale_2: torch.Tensor | None,
    per_position: bool,
    residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block over tokens ``x``.

    Args:
        x: tokens [B, C, H, W], contiguous or channels_last.
        moments: [B, 2, C] float32 moments of ``x`` for GroupNorm(1); None (not read) with ``per_position``.
        layer_scale_1, norm1_weight, norm1_bias: [C]; all None leaves the first half out (y = x).
        affine_weight, affine_bias: s and t of a training-time token mixer ([C] or [C, 1, 1, 1]), None when deployed.
        norm2_weight, norm2_bias: [C].
        fc1_weight, fc1_bias: [hidden, C] or [hidden, C, 1, 1], and [hidden].
        fc2_weight, fc2_bias: [C, hidden] or [C, hidden, 1, 1], and [C].
        layer_scale_2: [C] or None for 1.
        per_position: LayerNorm over the channels of each position instead of GroupNorm with one group.
        residual: False returns the branch ls2 * MLP(norm2(y)) alone, in place of y + branch.

    Returns:
        tokens like ``x``, and their moments [B, 2, C] float32 ([B, 2, 0] with ``per_position``, where none are needed).
    """
    work = working_dtype(x.dtype)

    def cast(parameter: torch.Tensor | None) -> torch.Tensor | None:
        return None if parameter is None else parameter.to(work)

    y = x.to(work)
    count = x.shape[2] * x.shape[3]
    moments = cast(moments)
    if norm1_weight is not None:
        weight, bias = algebra.fold_affine(cast(norm1_weight), cast(norm1_bias), cast(affine_weight), cast(affine_bias))
        scale = cast(layer_scale_1)
        if per_position:
            y = y + scale.view(1, -1, 1, 1) * algebra.position_norm(y, weight, bias, eps1)
        else:
            a, d, moments = algebra.first_subblock(moments, count, eps1, weight, bias, scale)
            y = a[:, :, None, None] * y + d[:, :, None, None]
    if per_position:
        z = algebra.position_norm(y, cast(norm2_weight), cast(norm2_bias), eps2)
    else:
        z = algebra.group_norm(y, moments, cast(norm2_weight), cast(norm2_bias), eps2)
    hidden = F.gelu(F.conv2d(z, cast(fc1_weight).flatten(1)[:, :, None, None], cast(fc1_bias)))
    branch = F.conv2d(hidden, cast(fc2_weight).flatten(1)[:, :, None, None], cast(fc2_bias))
    if layer_scale_2 is not None:
        branch = branch * cast(layer_scale_2).view(1, -1, 1, 1)
    out = (y + branch if residual else branch).to(x.dtype).contiguous(memory_format=memory_format_of(x))
    if per_position:
        return out, out.new_empty((out.shape[0], 2, 0), dtype=work)
    return out, algebra.moments_of(out.to(work))


def fake(
    x: torch.Tensor, moments: torch.Tensor | None, *parameters: torch.Tensor | float | bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    per_position = parameters[-2]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    return out, x.new_empty((x.shape[0], 2, 0 if per_position else x.shape[1]), dtype=working_dtype(x.dtype))


OP = Op("block", SCHEMA, reference=reference, fake=fake)


def reference_in_place(
    x: torch.Tensor, moments: torch.Tensor | None, *parameters: torch.Tensor | float | bool | None
) -> None:
    """``block`` written over ``x`` and ``moments``: what a forward pass uses, so that a stage needs one buffer."""
    out, out_moments = reference(x, moments, *parameters)
    x.copy_(out)
    if moments is not None:
        moments.copy_(out_moments)


def fake_in_place(
    x: torch.Tensor, moments: torch.Tensor | None, *parameters: torch.Tensor | float | bool | None
) -> None:
    return None


IN_PLACE = Op("block_", IN_PLACE_SCHEMA, reference=reference_in_place, fake=fake_in_place, in_place=True)
