"""Tell what a state dict is of, from its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .arch import ARCHS, Arch
from .model import RIFormer
from .safe_pickle import CheckpointError

__all__ = ["CheckpointInfo", "clean_name", "describe", "few", "infer_arch"]

_WRAPPERS = {"module", "_orig_mod", "backbone"}


def clean_name(name: str) -> str:
    """The name without the parts that wrappers put in: ``module``, ``_orig_mod``, ``backbone``."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def few(names: list[str], count: int = 4) -> str:
    """The first few names, and how many there are besides."""
    return ", ".join(names[:count]) + (f", ... ({len(names) - count} more)" if len(names) > count else "")


@dataclass(frozen=True)
class CheckpointInfo:
    """What the names and shapes of a state dict say about its model."""

    arch: Arch
    deploy: bool
    num_classes: int
    in_channels: int
    out_indices: tuple[int, ...]

    def build(self, *, norm: str = "gn", norm_eps: float = 1e-5, **options: Any) -> RIFormer:
        """A fresh `RIFormer` that the state dict fits; the norm is the caller's to say, see `infer_arch`."""
        arguments = {
            "in_channels": self.in_channels, "num_classes": self.num_classes, "deploy": self.deploy,
            "out_indices": self.out_indices, "norm": norm, "norm_eps": norm_eps,
        }  # fmt: skip
        return RIFormer(self.arch, **{**arguments, **options})


def infer_arch(state_dict: Mapping[str, Tensor]) -> CheckpointInfo:
    """Tell arch, form, classes and input channels from a state dict, so that nobody has to name the arch.

    Not to be told from it: the norm. GroupNorm(1) and per-position LayerNorm have the same parameters (all published
    weights are GroupNorm); files of `save_checkpoint` say it in their metadata. ``deploy`` is True if all blocks are
    deployed. The starting layer scale of a custom size is not known either and stays at its default.

    Raises:
        CheckpointError: the names are not those of a RIFormer, or its stages do not fit together.
    """
    shapes = {clean_name(name): tuple(tensor.shape) for name, tensor in state_dict.items()}
    stem = shapes.get("patch_embed.proj.weight", ())
    if len(stem) != 4 or stem[2:] != (7, 7):
        raise CheckpointError(
            "this is no RIFormer: expected 'patch_embed.proj.weight' of shape [C, channels, 7, 7], found "
            + (f"{list(stem)}" if stem else f"the names {few(list(shapes))}")
        )
    stages: dict[int, set[int]] = {}
    positions: set[int] = set()
    for name in shapes:
        if match := re.match(r"network\.(\d+)\.(\d+)\.", name):
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
        if match := re.match(r"network\.(\d+)\.", name):
            positions.add(int(match[1]))
    whole = positions == set(range(len(positions))) and all(s == set(range(len(s))) for s in stages.values())
    if not stages or not whole:
        raise CheckpointError(
            f"this is no whole RIFormer: found stages {sorted(stages)} among positions {sorted(positions)} of "
            "'network', expected them numbered from 0 without a gap"
        )
    dims, ratios = [], []
    for i in sorted(stages):
        fc1 = shapes.get(f"network.{i}.0.mlp.fc1.weight", ())
        if len(fc1) != 4 or fc1[2:] != (1, 1):
            raise CheckpointError(f"this is no RIFormer: expected 'network.{i}.0.mlp.fc1.weight' [hidden, C, 1, 1], "
                                  f"found {list(fc1) or 'nothing'}")  # fmt: skip
        hidden, dim = fc1[:2]
        ratio = hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim
        dims.append(dim)
        ratios.append(int(ratio) if ratio == int(ratio) else ratio)
    arch = Arch(tuple(len(stages[i]) for i in sorted(stages)), tuple(dims), tuple(ratios))
    if len(arch.channels) != len(positions) or stem[0] != dims[0]:
        raise CheckpointError(
            f"this is no whole RIFormer: widths {dims} need {len(arch.channels)} positions in 'network' and a stem of "
            f"{dims[0]} channels; found {len(positions)} positions and a stem of {stem[0]}"
        )
    blocks = [f"network.{i}.{j}" for i, found in stages.items() for j in found]
    return CheckpointInfo(
        arch=ARCHS[arch.name] if arch.name else arch,
        deploy=all(f"{block}.norm_reparam.weight" in shapes for block in blocks),
        num_classes=shapes.get("head.fc.weight", (0,))[0],
        in_channels=stem[1],
        out_indices=tuple(i for i in sorted(positions) if f"norm{i}.weight" in shapes) or (len(positions) - 1,),
    )


def describe(state_dict: Mapping[str, Tensor]) -> str:
    """One line about the model that a state dict is of, for error messages."""
    try:
        info = infer_arch(state_dict)
    except CheckpointError:
        return "no RIFormer"
    size = info.arch.name or f"a RIFormer with layers {list(info.arch.layers)} and widths {list(info.arch.embed_dims)}"
    outputs = ", ".join(f"norm{i}" for i in info.out_indices)
    return f"{size} ({info.num_classes} classes, {info.in_channels} input channels, {outputs})"
