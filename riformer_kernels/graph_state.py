"""What a captured CUDA graph depends on besides the values in its tensors: to tell when it has to be captured anew.

A graph keeps what the model did while it was captured: addresses, and whatever Python decided. So everything that can
change either is compared after each replay, while the GPU is still at work. C functions do nearly all of it, because
one image is done in about a hundred microseconds (what this takes is in bench/notes).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from operator import is_
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .fused import FusedBackbone
from .modules import STATE, Backbone
from .plan import BlockPlan, own_first_half
from .precision import products_of_float32
from .snapshot import settings_of

Cell = tuple[dict[str, Any], str]

_CONTENTS = ("_parameters", "_buffers", "_modules")
_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_CONTAINERS = (nn.Sequential, nn.ModuleList)  # what they are and hold counts, and nothing else
# Attributes of every module that have no part in a forward.
_OTHER = frozenset(
    name for name in nn.Module().__dict__ if "state_dict" in name or "backward" in name or "persistent" in name
)
_COPIED = (dict, OrderedDict, list, set)
_address: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr


class GraphState:
    """The state of a model as it was when this object was made.

    Recorded are, of every module, its class, its parameters, buffers and children, and where the tensors lie. Of the
    modules that run as they are (outside of a backbone, or not fused), also every attribute and hook; lists,
    dictionaries and sets among the attributes are compared by their items. Of fused modules, the settings that the
    kernels get, and whether there are hooks. What lies deeper in attributes, and global variables, is not seen.

    The tensors' memory is kept alive: a graph that has been replayed before a change was seen has read memory that the
    caller may have let go of by then.

    Args:
        model: the whole model.
        before: a state that was taken before the model was last called. Attributes that have changed since are left
            out: the model changes them by itself (a counter, a cached result).
    """

    def __init__(self, model: nn.Module, before: GraphState | None = None) -> None:
        modules = list(model.modules())
        backbones = [module for module in modules if isinstance(module, FusedBackbone)]
        fused = {key for backbone in backbones for key in _fused_modules(cast("Backbone", backbone))}
        within = [module for module in modules if id(module) in fused]
        as_they_are = [module for module in modules if id(module) not in fused]
        contents = [module.__dict__[name] for name in _CONTENTS for module in as_they_are]
        # What a fused module has none of, the kernels do not look for.
        contents += [values for name in _CONTENTS for module in within if (values := module.__dict__[name])]
        self._contents, self._copies = contents, [dict(values) for values in contents]
        hooks: list[Cell] = [(module.__dict__, name) for module in within for name in _FORWARD_HOOKS]
        self._no_hooks = [holder[name] for holder, name in hooks if not holder[name]]
        self._hooks_ever = _hooks_ever()
        self._modules, self._attributes = modules, [module.__dict__ for module in modules]

        settings: list[Cell] = list(zip(*settings_of(within), strict=True))
        settings += [(holder, name) for holder, name in hooks if holder[name]]
        settings += [(module.__dict__, key) for module in as_they_are for key in module.__dict__ if key not in _OTHER]
        settings += [(backbone.__dict__[STATE].__dict__, "_program") for backbone in backbones]
        changing = before.changed_settings() if before is not None else set()
        settings = [cell for cell in settings if _name(cell) not in changing and cell[1] not in _CONTENTS]
        loose = [(holder, key) for holder, key in settings if isinstance(holder[key], torch.Tensor)]
        plain = [(holder, key) for holder, key in settings if not isinstance(holder[key], torch.Tensor)]
        self._holders, self._keys = [holder for holder, _ in plain], [key for _, key in plain]

        stores: list[dict[str, Any]] = [store for module in modules for store in (module._parameters, module._buffers)]
        cells: list[Cell] = [(store, key) for store in stores for key, value in store.items() if value is not None]
        self._tensors = list({id(holder[key]): holder[key] for holder, key in cells + loose}.values())
        self._memory = [tensor.detach() for tensor in self._tensors]
        # Other tensors in place of these compare element by element, which fails unless there is one element alone.
        scalars = loose + [(holder, key) for holder, key in cells if holder[key].numel() == 1]
        self._scalar_holders, self._scalar_keys = [holder for holder, _ in scalars], [key for _, key in scalars]
        self._scalars = [holder[key] for holder, key in scalars]
        self._any_float32 = any(tensor.dtype == torch.float32 for tensor in self._tensors)
        self._precision = products_of_float32()
        # A container is compared with a copy of what it held, everything else with itself.
        self._record = [value.copy() if type(value) in _COPIED else value for value in self._take()]

    def _take(self) -> list[Any]:
        return [
            *map(_address, self._tensors),
            *map(type, self._modules),
            *map(len, self._attributes),
            *map(dict.get, self._holders, self._keys),
        ]

    def holds(self) -> bool:
        """Whether the model is as it was."""
        try:
            return (
                self._contents == self._copies
                and self._take() == self._record
                and (self._hooks_ever == _hooks_ever() or not any(self._no_hooks))
                and (not self._scalars or self._same_scalars())
                and (not self._any_float32 or products_of_float32() == self._precision)
            )
        except (RuntimeError, ValueError, TypeError):  # something whose == has more than one answer stands there now
            return False

    def _same_scalars(self) -> bool:
        return all(map(is_, map(dict.get, self._scalar_holders, self._scalar_keys), self._scalars))

    def changed_settings(self) -> set[tuple[int, str]]:
        """Names of the settings and plain tensors that are not what they were."""
        changed = set()
        values = self._record[-len(self._keys) :] if self._keys else []
        for holder, key, value in zip(self._holders, self._keys, values, strict=True):
            try:
                same = bool(holder[key] == value)
            except (RuntimeError, ValueError, TypeError, KeyError):
                same = False
            if not same:
                changed.add((id(holder), key))
        for holder, key, value in zip(self._scalar_holders, self._scalar_keys, self._scalars, strict=True):
            if holder.get(key) is not value:
                changed.add((id(holder), key))
        return changed


def _hooks_ever() -> int:
    """How many hooks PyTorch has been given so far, on anything. While it is the same, no module has a new one."""
    return RemovableHandle.next_id


def _name(cell: Cell) -> tuple[int, str]:
    return id(cell[0]), cell[1]


def _fused_modules(backbone: Backbone) -> set[int]:
    """Identities of the modules whose work the kernels do: their attributes do not count, but for a few settings."""
    plan = backbone.__dict__[STATE].program_for(backbone).plan
    found = {id(module) for module in backbone.modules() if type(module) in _CONTAINERS}
    for part in plan.parts():
        if part.reason is None and not (isinstance(part, BlockPlan) and own_first_half(part)):
            found.update(map(id, backbone.get_submodule(part.name).modules()))
    return found
