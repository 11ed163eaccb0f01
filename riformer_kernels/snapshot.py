"""A snapshot of the structure that a plan was made from, to tell whether the plan still holds.

Weights are no part of it: a plan keeps nothing that is derived from a weight. What it depends on is structure: hooks,
training flags of dropouts, submodules, their classes. One forward compares all of it in about ten microseconds, because
the record is flat and is compared by C functions (``dict.__eq__``, ``map``) alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from operator import itemgetter
from typing import Any

from torch import nn

from .modules import HOOKS, Backbone

_hooks = itemgetter(*HOOKS)
_SETTINGS = ("eps", "approximate", "num_groups")
_RATES = ("p", "drop_prob")


def settings_of(modules: Iterable[nn.Module]) -> tuple[list[dict[str, Any]], list[str]]:
    """Instance dictionaries and keys of the settings that decide what fused modules compute: eps, approximate and
    num_groups, ``training`` of the dropouts, and the rates p and drop_prob of those that are in training."""
    holders, keys = [], []
    for module in modules:
        values = module.__dict__
        rates = [key for key in _RATES if key in values]
        wanted = [key for key in _SETTINGS if key in values]
        if rates:
            wanted += ["training", *rates] if values.get("training") else ["training"]
        holders += [values] * len(wanted)
        keys += wanted
    return holders, keys


class Snapshot:
    """Everything about a backbone's modules that a plan depends on, except parameters.

    Recorded are the submodules and their classes, ``forward`` replaced on an instance, the number of hooks of each
    kind, the settings (``settings_of``), and out_indices. Sizes, strides and paddings of convolutions are not recorded,
    as nobody changes them in place.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._modules = [module for module in backbone.modules() if module is not backbone]
        self._dicts = [module.__dict__ for module in self._modules]
        self._children = [module._modules for module in (backbone, *self._modules)]
        self._holders, self._keys = settings_of(self._modules)
        self._copies = [dict(children) for children in self._children]
        self._hooks = self._numbers_of_hooks()
        self._hooked = any(self._hooks)
        self._record = self._take()

    def _numbers_of_hooks(self) -> list[int]:
        return list(map(len, chain.from_iterable(map(_hooks, self._dicts))))

    def _take(self) -> tuple[Any, ...]:
        return (
            list(map(type, self._modules)),
            list(map(dict.__contains__, self._dicts, repeat("forward"))),
            list(map(dict.get, self._holders, self._keys)),
            list(self._backbone.out_indices),
        )

    def _hooks_hold(self) -> bool:
        if self._hooked:
            return self._numbers_of_hooks() == self._hooks
        # Usually there are none. Whether there are any is found out in half the time that counting them takes.
        return not any(chain.from_iterable(map(_hooks, self._dicts)))

    def holds(self, backbone: Backbone) -> bool:
        """Whether ``backbone`` is the module that was recorded, unchanged."""
        return (
            backbone is self._backbone
            and self._children == self._copies
            and self._hooks_hold()
            and self._take() == self._record
        )
