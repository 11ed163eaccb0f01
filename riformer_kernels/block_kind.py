"""The kinds of block that can be fused: one entry of ``KINDS`` says where a block of that kind keeps everything.

Recognition, the probes, the forward pass and verification all read this table, so another kind of block is one more
entry. Its second half must be the unit of the ``block`` op, ``y + ls2 * fc2(gelu(fc1(norm2(y))))`` with 1x1
convolutions. Its first half is either what the op computes (``fuses_first_half``), ``x + ls1 * affine(norm1(x))``, or
anything else: the block's own modules then compute y before the op runs.

A *path* is a dotted name, relative to the block, of a submodule or of a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .modules import child, owner, reach


@dataclass(frozen=True)
class BlockKind:
    """Where a block keeps its modules and parameters.

    Attributes:
        name: what the report calls it where the first half is not fused, and errors where two kinds collide.
        mixer: paths of the modules that compute in turn what the first half adds to x, before the layer scale.
        affine: path of the token mixer's depthwise 1x1 convolution, which the op folds into the first norm, or None.
        fuses_first_half: whether the op computes the first half. Then the first of ``mixer`` is its norm, and the rest
            computes ``affine(n) - n``.
        norm2, fc1, act, fc2: paths of the second half's modules.
        mlp: path of the module that computes ``fc2(act(fc1(z)))``.
        drops: paths of what drops values while training; a block may lack them.
        layer_scale_1, layer_scale_2: paths of the parameters.
        idle: paths of modules that a block may have and does not run.
    """

    name: str
    mixer: tuple[str, ...]
    affine: str | None
    fuses_first_half: bool = True
    norm2: str = "norm2"
    fc1: str = "mlp.fc1"
    act: str = "mlp.act"
    fc2: str = "mlp.fc2"
    mlp: str = "mlp"
    drops: tuple[str, ...] = ("drop_path", "mlp.drop")
    layer_scale_1: str = "layer_scale_1"
    layer_scale_2: str = "layer_scale_2"
    idle: tuple[str, ...] = ()


# Functions and not methods: torch.compile follows a function that is given a kind, but no method of one.


def norm1_path(kind: BlockKind) -> str | None:
    """Path of the norm that the op computes in the first half, or None."""
    return kind.mixer[0] if kind.fuses_first_half else None


def recognises(kind: BlockKind, block: nn.Module) -> bool:
    """Whether a block has the modules and layer scales of this kind, whatever their types."""
    scales = [owner(block, path) for path in _scales(kind)]
    return all(child(block, path) is not None for path in _modules(kind)) and all(
        holder is not None and hasattr(holder, name) for holder, name in scales
    )


def unexpected_children(kind: BlockKind, block: nn.Module) -> list[str]:
    """Paths of the children, of the block and of its MLP, that this kind does not have."""
    known = {*kind.mixer, kind.norm2, kind.fc1, kind.act, kind.fc2, kind.mlp, *kind.drops, *kind.idle}
    known |= {path.rpartition(".")[0] for path in _scales(kind)}
    found = [*_children(block, ""), *_children(child(block, kind.mlp), f"{kind.mlp}.")]
    return [path for path in found if path not in known]


def tensor_paths(kind: BlockKind) -> dict[str, str | None]:
    """The path of each tensor among the op's parameters, by the parameter's name; None where the op gets None."""
    return {
        "layer_scale_1": kind.layer_scale_1 if kind.fuses_first_half else None,
        **_weight_and_bias("norm1", norm1_path(kind)),
        **_weight_and_bias("affine", kind.affine if kind.fuses_first_half else None),
        **_weight_and_bias("norm2", kind.norm2),
        **_weight_and_bias("fc1", kind.fc1),
        **_weight_and_bias("fc2", kind.fc2),
        "layer_scale_2": kind.layer_scale_2,
    }


def mixed(kind: BlockKind, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the first half adds to ``x`` before the layer scale, by the block's own modules."""
    for path in kind.mixer:
        x = reach(block, path)(x)
    return x


def first_half(kind: BlockKind, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """y, by the block's own modules."""
    return x + reach(block, kind.layer_scale_1)[:, None, None] * mixed(kind, block, x)


def mlp_branch(kind: BlockKind, block: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """What the second half adds to ``y`` before the layer scale, by the block's own modules."""
    return reach(block, kind.mlp)(reach(block, kind.norm2)(y))


def _modules(kind: BlockKind) -> tuple[str, ...]:
    """Paths of the modules that a block of this kind must have."""
    affine = () if kind.affine is None else (kind.affine,)
    return (*kind.mixer, *affine, kind.norm2, kind.fc1, kind.act, kind.fc2)


def _scales(kind: BlockKind) -> tuple[str, str]:
    return kind.layer_scale_1, kind.layer_scale_2


def _children(module: nn.Module, prefix: str) -> list[str]:
    return [prefix + name for name, inner in module._modules.items() if inner is not None]


def _weight_and_bias(name: str, path: str | None) -> dict[str, str | None]:
    return {f"{name}_{kind}": None if path is None else f"{path}.{kind}" for kind in ("weight", "bias")}


def ordered(*kinds: BlockKind) -> tuple[BlockKind, ...]:
    """The kinds as they are given.

    Raises:
        ValueError: a kind stands before one that has all of its paths and perhaps more, and would take its blocks.
    """
    for index, kind in enumerate(kinds):
        for later in kinds[index + 1 :]:
            if _needed(kind) <= _needed(later):
                raise ValueError(f"block kind {kind.name!r} recognises every block of {later.name!r}; put it behind")
    return kinds


def _needed(kind: BlockKind) -> set[str]:
    """The paths that recognition asks for, and those on the way to them."""
    paths = (*_modules(kind), *_scales(kind))
    return {".".join(names[:end]) for names in (path.split(".") for path in paths) for end in range(1, len(names) + 1)}


# A deployed block may keep the modules that its norm was folded from, so it is looked for first.
DEPLOYED = BlockKind("deployed", mixer=("norm_reparam",), affine=None, idle=("norm1", "token_mixer"))
TRAINING = BlockKind("training", mixer=("norm1", "token_mixer"), affine="token_mixer.affine")
KINDS = ordered(DEPLOYED, TRAINING)


def expected_mixers() -> str:
    """What a block of any kind has in its first half, for messages. A path goes without saying where a longer one of
    the same kind begins with it."""
    mixers = []
    for kind in KINDS:
        paths = (*kind.mixer, *(() if kind.affine is None else (kind.affine,)))
        told = [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]
        mixers.append(" with ".join(told))
    return ", or ".join(mixers)


def kind_of(block: nn.Module | None) -> BlockKind | None:
    """The first kind that recognises a module, or None."""
    if not isinstance(block, nn.Module):
        return None
    return next((kind for kind in KINDS if recognises(kind, block)), None)
