"""A snapshot of the structure that a plan was made from, to tell whether the plan still holds.

Weights are no part of it: a plan keeps nothing that is derived from a weight. What it depends on is structure: hooks,
training flags of dropouts, submodules, their classes. One forward compares all of it in tens of microseconds, because
the record is flat and is taken by C functions (``map``, ``attrgetter``) alone.
"""

from __future__ import annotations

from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any

from .modules import HOOKS, Backbone

_class = attrgetter("__class__")
_children = itemgetter("_modules")
_hooks = itemgetter(*HOOKS)
_SETTINGS = ("p", "drop_prob", "eps", "approximate", "num_groups")


class Snapshot:
    """Everything about a backbone's modules that a plan depends on, except parameters.

    Recorded are the submodules and their classes, ``forward`` replaced on an instance, the number of hooks of each
    kind, ``training`` of the dropouts, the settings p, drop_prob, eps, approximate and num_groups, and out_indices.
    Sizes, strides and paddings of convolutions are not recorded, as nobody changes them in place.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._modules = [module for module in backbone.modules() if module is not backbone]
        self._dicts = [module.__dict__ for module in self._modules]
        watched = [
            ("training", module) for module in self._modules if "p" in module.__dict__ or "drop_prob" in module.__dict__
        ]
        watched += [(key, module) for module in self._modules for key in _SETTINGS if key in module.__dict__]
        self._watched = [module.__dict__ for _, module in watched]
        self._keys = [key for key, _ in watched]
        self._record = self._take()

    def _take(self) -> tuple[Any, ...]:
        dicts = self._dicts
        return (
            list(chain(self._backbone._modules.values(), chain.from_iterable(map(dict.values, map(_children, dicts))))),
            list(map(_class, self._modules)),
            list(map(len, chain.from_iterable(map(_hooks, dicts)))),
            list(map(dict.__contains__, dicts, repeat("forward"))),
            list(map(dict.get, self._watched, self._keys)),
            list(self._backbone.out_indices),
        )

    def holds(self, backbone: Backbone) -> bool:
        """Whether ``backbone`` is the module that was recorded, unchanged."""
        return backbone is self._backbone and self._take() == self._record
