"""Twins of modules: the same classes and attributes with other tensors, and without the user's hooks.

Probes and verification run twins, so that the user's module is neither run nor changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .modules import HOOKS, STATE, original_class


def twin_of(
    module: nn.Module, change: Callable[[str, torch.Tensor], torch.Tensor], dtype: torch.dtype, prefix: str = ""
) -> nn.Module:
    """A module tree of the same classes and attributes, with ``change(name, parameter)`` in place of each parameter.

    Buffers and plain tensor attributes are copied, floating-point ones to ``dtype``: a BatchNorm in training mode
    writes to its statistics. Hooks are left out. A patched module's twin has its original class.
    """
    cls = original_class(module)
    twin = cls.__new__(cls)

    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to(dtype, copy=True) if value.is_floating_point() else value.detach().clone()

    state = {name: copied(value) for name, value in module.__dict__.items() if name != STATE}
    state |= {name: OrderedDict() for name in HOOKS}
    state["_buffers"] = {name: copied(value) for name, value in module._buffers.items()}
    state["_parameters"] = {
        name: None if value is None else change(prefix + name, value) for name, value in module._parameters.items()
    }
    state["_modules"] = {
        name: None if inner is None else twin_of(inner, change, dtype, f"{prefix}{name}.")
        for name, inner in module._modules.items()
    }
    twin.__dict__ = state
    return twin


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A twin with parameters in ``dtype``, contiguous. They share memory with the module's where nothing changes."""
    return twin_of(module, lambda _, value: value.detach().to(dtype).contiguous(), dtype)
