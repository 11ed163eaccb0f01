"""Reading other people's modules: typed, and through registered children only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

STATE = "_riformer_kernels"  # where a patched module's instance keeps its PatchState
HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


class Backbone(nn.Module):
    """What the engine reads of a RIFormer backbone, for the type checker alone: no backbone is an instance of it.

    nn.Module declares every attribute as a tensor or a module, which is of no use for modules known by their structure.

    Attributes:
        patch_embed: the stem, a module with a convolution ``proj``.
        network: in turn a Sequential of blocks, and a downsampling module with a convolution ``proj``.
        head: a module with a Linear ``fc``; a bare backbone has none.
        out_indices: the positions of ``network`` whose tokens are normed and returned.
    """

    patch_embed: Any
    network: Sequence[Any]
    head: Any
    out_indices: Sequence[int]


def child(module: nn.Module | None, path: str) -> Any:
    """The submodule at a dotted path, through registered children only (no ``__getattr__`` of wrappers), or None."""
    for name in path.split("."):
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module


def reach(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, read in a way that torch.compile can follow."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def owner(module: nn.Module | None, path: str) -> tuple[Any, str]:
    """The submodule that holds the attribute at a dotted path, or None, and the attribute's name."""
    holder, _, name = path.rpartition(".")
    return (child(module, holder) if holder else module), name


def parameter(module: nn.Module, path: str) -> torch.Tensor | None:
    """The parameter at a dotted path, or None. Plain tensor attributes count on DataParallel replicas only, where all
    parameters are such."""
    holder, name = owner(module, path)
    if holder is None:
        return None
    found = holder._parameters.get(name)
    return holder.__dict__.get(name) if found is None and holder.__dict__.get("_is_replica") else found


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, for a patched one the class that it had before."""
    return getattr(type(module), "_original_class", type(module))
