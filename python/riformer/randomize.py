"""Hard parameters: random values under which a broken kernel shows.

A fresh RIFormer has a layer scale of 1e-5 and every block is nearly the identity, so replacing all of its blocks by
nothing passes most comparisons. Every numeric test and demonstration of this project therefore uses `randomize_`.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import TypeVar

import torch
from torch import Tensor, nn

from .model import fold_affine

__all__ = ["randomize_"]

ModelT = TypeVar("ModelT", bound=nn.Module)

_PREFIX = re.compile(r"^((module|_orig_mod|backbone)\.)+")
_NORM = re.compile(r"(^|\.)norm\d+\.(weight|bias)$")


@torch.no_grad()
def randomize_(model: ModelT, seed: int = 0) -> ModelT:
    """Overwrite every parameter of a RIFormer, in place, with hard random values; return the model.

    Distribution (N(mean, std), fan = inputs of one output):

    =============================  =====================================
    layer_scale_1, layer_scale_2   N(0.5, 0.3)
    norm weight                    N(1, 0.25)
    norm bias                      N(0, 0.25)
    token_mixer.affine weight s    N(1, 0.5): the branch has a random sign, so it does not add up over the blocks
    token_mixer.affine bias t      N(0, 0.25)
    convolutions, fc: weight       N(0, 1 / sqrt(fan)); fc2 N(0, 1.5 / sqrt(fan)), since GELU halves its input's size
    convolutions, fc: bias         N(0, 0.25); fc1 N(0, 0.5)
    =============================  =====================================

    Each branch then has a size of about 0.5 and a feature map of even M48 stays within a few tens (a test checks).

    The values depend on ``seed`` and the parameter's name only (``backbone.``, ``module.`` and ``_orig_mod.`` in front
    do not count), not on torch's generators or the device; they are float32 values, rounded further where the parameter
    is narrower. So our model and mmpretrain's get the same weights, a float64 model those of a float32 one, and a
    deployed model, to the bit, what ``switch_to_deploy`` makes of a training-time one.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has a parameter whose name is none of a RIFormer's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"randomize_ needs an nn.Module; found {type(model).__name__}")
    names = {name: _PREFIX.sub("", name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        _distribution(names[name], parameter.shape)  # Refuse an unknown name before anything changes.
    for name, parameter in model.named_parameters():
        folded = ".norm_reparam." in names[name]
        parameter.copy_(_folded(names[name], parameter, seed) if folded else _draw(names[name], parameter.shape, seed))
    return model


def _folded(name: str, parameter: Tensor, seed: int) -> Tensor:
    stem, which = name.rsplit(".norm_reparam.", 1)
    names = [f"{stem}.{part}.{kind}" for part in ("norm1", "token_mixer.affine") for kind in ("weight", "bias")]
    # Rounded before the fold, because a training-time model's are.
    return fold_affine(*(_draw(n, parameter.shape, seed).to(parameter.dtype) for n in names))[which == "bias"]


def _draw(name: str, shape: torch.Size, seed: int) -> Tensor:
    mean, std = _distribution(name, shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    # float64's generator gives the same digits on every instruction set; float32's differs in the last.
    return torch.empty(shape, dtype=torch.float64).normal_(mean, std, generator=generator).float()


def _distribution(name: str, shape: torch.Size) -> tuple[float, float]:
    weight = name.endswith(".weight")
    if name.endswith(("layer_scale_1", "layer_scale_2")):
        return 0.5, 0.3
    if ".norm_reparam." in name:
        return 0.0, 0.5  # Not drawn: folded from the names that a training-time model has.
    if _NORM.search(name):
        return (1.0, 0.25) if weight else (0.0, 0.25)
    if ".token_mixer.affine." in name:
        return (1.0, 0.5) if weight else (0.0, 0.25)
    if re.search(r"(^|\.)(proj|fc1|fc2|fc)\.(weight|bias)$", name):
        if not weight:
            return 0.0, 0.5 if ".fc1." in name else 0.25
        return 0.0, (1.5 if ".fc2." in name else 1.0) / math.sqrt(shape[1:].numel())
    raise ValueError(
        f"randomize_ found parameter {name!r} of shape {list(shape)}, which no RIFormer has; it knows the names of "
        "riformer.RIFormer and mmpretrain's RIFormer and ImageClassifier"
    )
