"""``block``: a whole RIFormer block, and with its first half left out the LN-1x1 unit of the paper.

y   = x + ls1 * (gamma1' norm1(x) + beta1')          gamma1', beta1': the token mixer's affine folded in
out = y + ls2 * (W2 gelu(W1 norm2(y) + b1) + b2)     (RIFormer, arXiv 2304.05659, section 3.3)
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F

from .. import algebra, quantise
from ._library import Op, memory_format_of, needed, working_dtype


class BlockParameters(NamedTuple):
    """What ``block`` and ``block_`` take after ``x`` and ``moments``. Both schemas are made of these fields.

    Attributes:
        layer_scale_1, norm1_weight, norm1_bias: [C]; all None leaves the first half out (y = x).
        affine_weight, affine_bias: s and t of a training-time token mixer ([C] or [C, 1, 1, 1]), None when deployed.
        eps1: the first norm's epsilon.
        norm2_weight, norm2_bias: [C].
        eps2: the second norm's epsilon.
        fc1_weight, fc1_bias: [hidden, C] or [hidden, C, 1, 1], and [hidden].
        fc2_weight, fc2_bias: [C, hidden] or [C, hidden, 1, 1], and [C].
        layer_scale_2: [C] or None for 1.
        per_position: LayerNorm over the channels of each position instead of GroupNorm with one group.
        residual: False returns the branch ls2 * MLP(norm2(y)) alone, in place of y + branch.
        int8: the two products of the MLP in int8 instead of the tokens' arithmetic, see ``quantise``. Its gradient is
            that of the block without the rounding.
    """

    layer_scale_1: torch.Tensor | None
    norm1_weight: torch.Tensor | None
    norm1_bias: torch.Tensor | None
    affine_weight: torch.Tensor | None
    affine_bias: torch.Tensor | None
    eps1: float
    norm2_weight: torch.Tensor
    norm2_bias: torch.Tensor
    eps2: float
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None
    layer_scale_2: torch.Tensor | None
    per_position: bool
    residual: bool
    int8: bool = False


_SCHEMA_TYPES = {torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", float: "float", bool: "bool"}
_DEFAULTS = {name: f"={value}" for name, value in BlockParameters._field_defaults.items()}
_PARAMETERS = ", ".join(
    f"{_SCHEMA_TYPES[kind]} {name}{_DEFAULTS.get(name, '')}" for name, kind in get_type_hints(BlockParameters).items()
)
SCHEMA = f"(Tensor x, Tensor? moments, {_PARAMETERS}) -> (Tensor, Tensor)"
IN_PLACE_SCHEMA = f"(Tensor(a!) x, Tensor(b!)? moments, {_PARAMETERS}) -> ()"


def reference(x: torch.Tensor, moments: torch.Tensor | None, *parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One block over tokens ``x``.

    Args:
        x: tokens [B, C, H, W], contiguous or channels_last.
        moments: [B, 2, C] float32 moments of ``x`` for GroupNorm(1); None (not read) with ``per_position``.
        parameters: the fields of ``BlockParameters``, in their order.

    Returns:
        tokens like ``x``, and their moments [B, 2, C] float32 ([B, 2, 0] with ``per_position``, where none are needed).
    """
    work = working_dtype(x.dtype)
    values: list[Any] = [value.to(work) if isinstance(value, torch.Tensor) else value for value in parameters]
    p = BlockParameters(*values)
    y = x.to(work)
    count = x.shape[2] * x.shape[3]
    moments = None if moments is None else moments.to(work)
    if p.norm1_weight is not None:
        assert p.layer_scale_1 is not None and p.norm1_bias is not None, "a first half needs all three"
        weight, bias = algebra.fold_affine(p.norm1_weight, p.norm1_bias, p.affine_weight, p.affine_bias)
        if p.per_position:
            y = y + p.layer_scale_1.view(1, -1, 1, 1) * algebra.position_norm(y, weight, bias, p.eps1)
        else:
            a, d, moments = algebra.first_half(needed(moments), count, p.eps1, weight, bias, p.layer_scale_1)
            y = a[:, :, None, None] * y + d[:, :, None, None]
    if p.per_position:
        z = algebra.position_norm(y, p.norm2_weight, p.norm2_bias, p.eps2)
    else:
        z = algebra.group_norm(y, needed(moments), p.norm2_weight, p.norm2_bias, p.eps2)
    hidden = F.gelu(F.conv2d(z, p.fc1_weight.flatten(1)[:, :, None, None], p.fc1_bias))
    branch = F.conv2d(hidden, p.fc2_weight.flatten(1)[:, :, None, None], p.fc2_bias)
    if p.int8:
        rounded = quantise.mlp(z, p.fc1_weight.flatten(1), p.fc1_bias, p.fc2_weight.flatten(1), p.fc2_bias)
        branch = branch + (rounded - branch).detach()
    if p.layer_scale_2 is not None:
        branch = branch * p.layer_scale_2.view(1, -1, 1, 1)
    out = (y + branch if p.residual else branch).to(x.dtype).contiguous(memory_format=memory_format_of(x))
    if p.per_position:
        return out, out.new_empty((out.shape[0], 2, 0), dtype=work)
    return out, algebra.moments_of(out.to(work))


def fake(x: torch.Tensor, moments: torch.Tensor | None, *parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
    channels = 0 if BlockParameters(*parameters).per_position else x.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    return out, x.new_empty((x.shape[0], 2, channels), dtype=working_dtype(x.dtype))


OP = Op("block", SCHEMA, reference=reference, fake=fake)


def reference_in_place(x: torch.Tensor, moments: torch.Tensor | None, *parameters: Any) -> None:
    """``block`` written over ``x`` and ``moments``: what a forward pass uses, so that a stage needs one buffer."""
    out, out_moments = reference(x, moments, *parameters)
    x.copy_(out)
    if moments is not None:
        moments.copy_(out_moments)


def fake_in_place(x: torch.Tensor, moments: torch.Tensor | None, *parameters: Any) -> None:
    return None


IN_PLACE = Op("block_", IN_PLACE_SCHEMA, reference=reference_in_place, fake=fake_in_place, in_place=True)
