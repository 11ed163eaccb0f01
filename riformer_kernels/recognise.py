"""Recognising a RIFormer by its structure, and saying for every part of it whether it can be fused, or why not.

Nothing here imports mmpretrain or the reference implementation. A backbone is what has the attributes of mmpretrain's
``RIFormer``: ``patch_embed.proj``, ``network``, ``out_indices`` and ``norm{i}``. Those of a block are in
``block_kind``. ``describe`` reads structure only and runs nothing. That a module's ``forward`` is the expected function
is for ``probe`` to find out.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from .block_kind import BlockKind, expected_mixers, kind_of, norm1_path, unexpected_children
from .modules import HOOKS, Backbone, child, parameter
from .plan import BackbonePlan, BlockPlan, EmbedPlan, HeadPlan, NormPlan, StagePlan


def why_not_backbone(module: nn.Module) -> str | None:
    """None for a RIFormer backbone, otherwise the first thing that is missing."""
    if child(module, "patch_embed.proj") is None:
        return "has no patch_embed.proj"
    network = child(module, "network")
    if not isinstance(network, nn.ModuleList):
        return "has no ModuleList 'network'"
    if not isinstance(module.__dict__.get("out_indices"), (list, tuple)):
        return "has no out_indices"
    blocks = [block for stage in network if isinstance(stage, nn.Sequential) for block in stage]
    if not any(kind_of(block) for block in blocks):
        mixer = child(blocks[0], "token_mixer") if blocks else None
        found = "" if mixer is None else f" (its token mixer is {type(mixer).__name__})"
        return f"none of its {len(blocks)} blocks has RIFormer's {expected_mixers()}{found}"
    return None


def find(model: nn.Module) -> list[tuple[str, Backbone]]:
    """All RIFormer backbones in a module, each once, as (dotted name, module). The module's own name is ``""``."""
    return [
        (name, cast("Backbone", module)) for name, module in model.named_modules() if why_not_backbone(module) is None
    ]


def hook_reason(module: nn.Module, name: str = "") -> str | None:
    """The first hook found on a module or below it: fused, those modules would not be called and it would not fire."""
    for path, inner in module.named_modules(prefix=name):
        for attribute, label in HOOKS.items():
            if inner.__dict__.get(attribute):
                return f"{label} on {path or 'the module itself'}, which would not fire"
    return None


def _overridden(module: nn.Module, name: str = "") -> str | None:
    for path, inner in module.named_modules(prefix=name):
        for method in ("forward", "__call__", "_conv_forward"):
            if method in inner.__dict__:
                return f"{method} of {path or 'the module itself'} was replaced on the instance, by another patcher"
        if type(inner).__call__ is not nn.Module.__call__:
            return f"{type(inner).__name__} of {path or 'the module itself'} has a __call__ of its own"
    return None


def _strange(module: nn.Module, name: str, weights: tuple[str, ...], optional: tuple[str, ...] = ()) -> str | None:
    """Why a module's parameters cannot be read in place: parametrized, pruned, quantized, missing."""
    if "parametrizations" in module._modules:
        return f"{name} is parametrized: its weight is computed on each access"
    if module._modules:
        return f"{name} ({type(module).__name__}) has unexpected children: {', '.join(module._modules)}"
    expected = {*weights, *optional}
    extra = [key for key, value in module._parameters.items() if value is not None and key not in expected]
    if extra:
        return f"{name} ({type(module).__name__}) has unexpected parameters: {', '.join(extra)}"
    for key in weights:
        if parameter(module, key) is None:
            return f"{name} has no {key} parameter"
    for key in expected:
        value = parameter(module, key)
        if value is not None and (value.layout != torch.strided or value.is_quantized):
            return (
                f"{name}.{key} is {'quantized' if value.is_quantized else str(value.layout)}, not a plain dense tensor"
            )
    return None


def _conv_reason(module: nn.Module, name: str) -> str | None:
    if not isinstance(module, nn.Conv2d):
        return f"{name} is {type(module).__name__}, not nn.Conv2d"
    if type(module).forward is not nn.Conv2d.forward or type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{name} is {type(module).__name__}, whose forward is not nn.Conv2d's"
    return _strange(module, name, ("weight",), ("bias",))


def _pointwise_reason(module: nn.Module, name: str, groups: int = 1) -> str | None:
    reason = _conv_reason(module, name)
    if reason is None:
        wanted = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "groups": groups}
        for attribute, value in wanted.items():
            if getattr(module, attribute) != value:
                return f"{name} has {attribute} {getattr(module, attribute)}, expected {value}"
    return reason


def _norm(module: nn.Module, name: str, channels: int) -> tuple[bool, float, str | None]:
    """(per_position, eps, reason) of a norm. Whether an own ``forward`` does the expected is for ``probe`` to say."""
    kind = type(module).__name__
    if isinstance(module, nn.GroupNorm):
        if module.num_groups != 1:
            return False, module.eps, f"{name} is GroupNorm with {module.num_groups} groups, expected 1"
        found, per_position = module.num_channels, False
    elif isinstance(module, nn.LayerNorm):
        if type(module).forward is nn.LayerNorm.forward:
            return True, module.eps, f"{name} is a plain nn.LayerNorm, which normalises the width of NCHW, not channels"
        found, per_position = module.normalized_shape[0] if len(module.normalized_shape) == 1 else 0, True
    else:
        return False, 0.0, f"{name} is {kind}; only GroupNorm with one group and LayerNorm over channels can be fused"
    if found != channels:
        return per_position, module.eps, f"{name} normalises {found} channels, expected {channels}"
    if parameter(module, "weight") is None or parameter(module, "bias") is None:
        return per_position, module.eps, f"{name} has no affine weight and bias"
    return per_position, module.eps, _strange(module, name, ("weight", "bias"))


def _width_reason(channels: int, multiple: int, what: str = "channels") -> str | None:
    if channels % multiple == 0:
        return None
    return (
        f"{channels} {what}: the native kernels need a multiple of {multiple}; "
        "use backend='reference' for plain PyTorch"
    )


def _dropping(module: nn.Module | None, name: str) -> str | None:
    """Why a Dropout or DropPath (any class with a ``drop_prob``) is not the identity right now."""
    if module is None or type(module) is nn.Identity:
        return None
    if isinstance(module, nn.Dropout):
        rate = module.p
    elif "drop_prob" in module.__dict__:
        rate = module.__dict__["drop_prob"] or 0.0
    else:
        return f"{name} is {type(module).__name__}, expected Dropout, DropPath or Identity"
    if rate > 0 and module.training:
        return f"{name} ({type(module).__name__}, p={rate:g}) is active while training; model.eval() turns it off"
    return None


def _block_structure(block: nn.Module, kind: BlockKind, multiple: int) -> str | None:
    """The first reason that does not concern the norms."""
    extra = unexpected_children(kind, block)
    if extra:
        return f"has children that a RIFormer block does not have: {', '.join(extra)}"
    fc1, fc2, act = child(block, kind.fc1), child(block, kind.fc2), child(block, kind.act)
    reason = _pointwise_reason(fc1, kind.fc1) or _pointwise_reason(fc2, kind.fc2)
    if reason:
        return reason
    if not isinstance(act, nn.GELU) or type(act).forward is not nn.GELU.forward:
        return f"{kind.act} is {type(act).__name__}, only exact (erf) GELU can be fused"
    if act.approximate != "none":
        return f"{kind.act} is GELU(approximate={act.approximate!r}), only exact (erf) GELU can be fused"
    channels, hidden = fc1.in_channels, fc1.out_channels
    if (fc2.in_channels, fc2.out_channels) != (hidden, channels):
        return f"{kind.fc2} maps {fc2.in_channels} to {fc2.out_channels} channels, expected {hidden} to {channels}"
    reason = _width_reason(channels, multiple) or _width_reason(hidden, multiple, "hidden channels")
    for name in (kind.layer_scale_1, kind.layer_scale_2):
        scale = parameter(block, name)
        if scale is None or tuple(scale.shape) != (channels,):
            reason = reason or f"{name} is not a parameter of shape [{channels}]"
    dropping = (_dropping(child(block, path), path) for path in kind.drops)
    return reason or next((found for found in dropping if found), None)


def _affine_reason(block: nn.Module, path: str, channels: int) -> str | None:
    """Why the affine in a token mixer cannot be folded into the norm before it."""
    holder = path.rpartition(".")[0]
    mixer, affine = child(block, holder), child(block, path)
    reason = _pointwise_reason(affine, path, groups=channels)
    if reason is None and (len(mixer._modules) != 1 or affine.in_channels != channels):
        reason = f"{holder} is not one depthwise convolution over {channels} channels"
    return reason


def describe_block(block: nn.Module, name: str, multiple: int = 8) -> BlockPlan:
    """The plan of one block; ``multiple``: what the kernels need the channels to be a multiple of."""
    kind = kind_of(block)
    if kind is None:
        return BlockPlan(name, None, 0, 0, False, 0.0, 0.0, f"{type(block).__name__} is not a RIFormer block")
    reason = hook_reason(block) or _overridden(block) or _block_structure(block, kind, multiple)
    fc1 = child(block, kind.fc1)
    channels, hidden = getattr(fc1, "in_channels", 0), getattr(fc1, "out_channels", 0)
    per_position, eps2, second_reason = _norm(child(block, kind.norm2), kind.norm2, channels)
    eps1, first_reason = 0.0, None
    norm1 = norm1_path(kind)
    if norm1 is not None:
        per_position_1, eps1, first_reason = _norm(child(block, norm1), norm1, channels)
        if first_reason is None and second_reason is None and per_position_1 != per_position:
            second_reason = f"{norm1} and {kind.norm2} are of different kinds"
    reason = reason or first_reason or second_reason
    if reason is None and kind.affine is not None and kind.fuses_first_half:
        reason = _affine_reason(block, kind.affine, channels)
    return BlockPlan(name, kind, channels, hidden, per_position, eps1, eps2, reason)


def _describe_embed(module: nn.Module, name: str, role: str, multiple: int) -> EmbedPlan:
    conv = child(module, "proj")
    reason = hook_reason(module) or _overridden(module) or _conv_reason(conv, "proj")
    norm = child(module, "norm")
    if reason is None and norm is not None and type(norm) is not nn.Identity:
        reason = f"norm is {type(norm).__name__}, expected none or Identity"
    extra = set(module._modules) - {"proj", "norm"}
    if reason is None and extra:
        reason = f"has children that a patch embedding does not have: {', '.join(sorted(extra))}"
    if not isinstance(conv, nn.Conv2d):
        return EmbedPlan(name, role, 0, 0, (0, 0), 0, 0, reason)
    stride, padding = conv.stride[0], conv.padding[0] if isinstance(conv.padding, tuple) else -1
    if reason is None:
        if conv.groups != 1 or tuple(conv.dilation) != (1, 1) or conv.padding_mode != "zeros":
            reason = f"proj has groups {conv.groups}, dilation {conv.dilation}, padding_mode {conv.padding_mode!r}"
        elif conv.stride != (stride, stride) or conv.padding != (padding, padding):
            reason = f"proj has stride {conv.stride} and padding {conv.padding}, expected square ones"
    reason = reason or _width_reason(conv.out_channels, multiple)
    kernel = (conv.kernel_size[0], conv.kernel_size[1])
    return EmbedPlan(name, role, conv.in_channels, conv.out_channels, kernel, stride, padding, reason)


def _describe_head(backbone: Backbone, last: NormPlan | None) -> HeadPlan | None:
    head = child(backbone, "head")
    if head is None:
        return None
    fc = child(head, "fc")
    if not isinstance(fc, nn.Linear):
        return HeadPlan("head", 0, 0, f"head is {type(head).__name__} without a Linear 'fc'")
    reason = hook_reason(head) or _overridden(head) or _strange(fc, "fc", ("weight",), ("bias",))
    if reason is None and type(fc).forward is not nn.Linear.forward:
        reason = f"fc is {type(fc).__name__}, whose forward is not nn.Linear's"
    if reason is None and (len(head._modules) != 1 or any(True for _ in head.parameters(recurse=False))):
        reason = f"head has more than 'fc': {', '.join(head._modules)}"
    if reason is None and last is None:
        reason = "the last position is not in out_indices"
    if reason is None and last is not None:
        if last.reason is not None:
            reason = "the norm before it is not fused"
        elif fc.in_features != last.channels:
            reason = f"fc has {fc.in_features} inputs, expected {last.channels}"
    return HeadPlan("head", fc.in_features, fc.out_features, reason)


def describe(backbone: Backbone, multiple: int = 8) -> BackbonePlan:
    """What the fused forward of a backbone would do, and for every part the reason if it cannot be fused, as of now.

    Args:
        backbone: a module for which ``why_not_backbone`` is None.
        multiple: what the backend's kernels need the channels to be a multiple of (1: anything).
    """
    network: list[StagePlan | EmbedPlan] = []
    width: dict[int, int] = {}  # channels, by position of the network
    for index, item in enumerate(backbone.network):
        name = f"network.{index}"
        if isinstance(item, nn.Sequential):
            reason = next(
                (f"{HOOKS[key]} on the stage, which would not fire" for key in HOOKS if item.__dict__.get(key)), None
            )
            if "forward" in item.__dict__ or type(item).forward is not nn.Sequential.forward:
                reason = reason or f"forward of the stage ({type(item).__name__}) is not nn.Sequential's"
            blocks = tuple(describe_block(block, f"{name}.{i}", multiple) for i, block in enumerate(item))
            network.append(StagePlan(name, blocks, reason))
            width[index] = blocks[-1].channels if blocks else width.get(index - 1, 0)
        else:
            downsample = _describe_embed(item, name, "downsample", multiple)
            network.append(downsample)
            width[index] = downsample.channels
    norms = []
    for index in sorted(set(backbone.out_indices)):
        name = f"norm{index}"
        norm = child(backbone, name)
        if norm is None or index not in width:
            norms.append(NormPlan(name, index, 0, False, 0.0, f"out_indices names {index}, but there is no {name}"))
            continue
        per_position, eps, reason = _norm(norm, name, width[index])
        reason = hook_reason(norm) or _overridden(norm) or reason
        norms.append(NormPlan(name, index, width[index], per_position, eps, reason))
    last = norms[-1] if norms and norms[-1].index == len(network) - 1 else None
    stem = _describe_embed(backbone.patch_embed, "patch_embed", "stem", multiple)
    return BackbonePlan(stem, tuple(network), tuple(norms), _describe_head(backbone, last))
