"""A plan made ready to run: what it was derived from (so that a change shows), and where every parameter lives.

Nothing derived from a weight is kept. A *cell* is the dictionary that holds a parameter and its name there, and each
forward reads the parameter through it, so ``load_state_dict``, ``assign=True``, ``.to()``, an optimizer step,
``functional_call`` and even ``p.data.copy_()`` are seen without any invalidation.

What a plan depends on besides is structure: hooks, training flags of dropouts, submodules, their classes. ``Guard``
keeps a flat record of those which one forward can compare in tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import nn

from .recognise import HOOKS, BackbonePlan, BlockPlan, StagePlan, child

Cell = tuple[dict[str, Any], str] | None

_class = attrgetter("__class__")
_children = itemgetter("_modules")
_hooks = itemgetter(*HOOKS)
_SETTINGS = ("p", "drop_prob", "eps", "approximate", "num_groups")


class Guard:
    """Everything about a backbone's modules that a plan depends on, except parameters.

    Compared on each forward: the submodules and their classes, ``forward`` replaced on an instance, which hook
    dictionaries are empty, ``training`` of the dropouts, and the settings p, drop_prob, eps, approximate, num_groups.
    Not compared (nobody changes them in place): sizes, strides and paddings of convolutions.
    """

    def __init__(self, backbone: nn.Module) -> None:
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

    def holds(self, backbone: nn.Module) -> bool:
        """Whether ``backbone`` is the module that was recorded, unchanged."""
        return backbone is self._backbone and self._take() == self._record


def _cell(module: nn.Module | None, name: str) -> Cell:
    """Where a module keeps a tensor. DataParallel replicas keep them as plain attributes, all others as parameters."""
    if module is None:
        return None
    return (module._parameters, name) if name in module._parameters else (module.__dict__, name)


def _fetch(cells: Iterable[Cell]) -> list[torch.Tensor | None]:
    return [None if cell is None else cell[0][cell[1]] for cell in cells]


def block_cells(block: nn.Module, plan: BlockPlan) -> tuple[Cell, ...]:
    """The cells of a block's tensors, in the order of the op's schema (the two eps left out)."""
    first = child(block, "norm_reparam" if plan.deployed else "norm1")
    affine = None if plan.deployed else child(block, "token_mixer.affine")
    norm2, fc1, fc2 = child(block, "norm2"), child(block, "mlp.fc1"), child(block, "mlp.fc2")
    return (
        _cell(block, "layer_scale_1"), _cell(first, "weight"), _cell(first, "bias"), _cell(affine, "weight"),
        _cell(affine, "bias"), _cell(norm2, "weight"), _cell(norm2, "bias"), _cell(fc1, "weight"), _cell(fc1, "bias"),
        _cell(fc2, "weight"), _cell(fc2, "bias"), _cell(block, "layer_scale_2"),
    )  # fmt: skip


def block_arguments(tensors: list[torch.Tensor | None], plan: BlockPlan, residual: bool = True) -> list[Any]:
    """The op's arguments after ``x`` and ``moments``."""
    return [*tensors[:5], plan.eps1, *tensors[5:7], plan.eps2, *tensors[7:], plan.per_position, residual]


class Program:
    """A plan with the cells of its parameters. Belongs to one module; rebuilt when ``guard`` no longer holds."""

    def __init__(self, backbone: nn.Module, plan: BackbonePlan) -> None:
        self.plan = plan
        self.guard = Guard(backbone)
        self.reasons = plan.reasons()
        self.blocks = {}
        self.pairs = {}
        for index, item in enumerate(plan.network):
            module = backbone.network[index]
            if isinstance(item, StagePlan):
                for position, block in enumerate(item.blocks):
                    if item.reason is None and block.reason is None:
                        self.blocks[index, position] = block_cells(module[position], block)
            elif item.reason is None:
                self.pairs[item.name] = self._pair(module.proj)
        if plan.stem.reason is None:
            self.pairs[plan.stem.name] = self._pair(backbone.patch_embed.proj)
        for norm in plan.norms:
            if norm.reason is None:
                self.pairs[norm.name] = self._pair(child(backbone, norm.name))
        if plan.head is not None and plan.head.reason is None:
            self.pairs[plan.head.name] = self._pair(backbone.head.fc)
        # A DataParallel replica keeps its tensors, non-leaves with gradients, under another name.
        store = "_former_parameters" if backbone.__dict__.get("_is_replica") else "_parameters"
        self._parameters = [module.__dict__[store] for module in backbone.modules()]
        # Decides input dtype and the default of the tokens; read through its cell, as .to() may change it.
        self._lead = _cell(child(backbone, "patch_embed.proj"), "weight")

    @staticmethod
    def _pair(module: nn.Module) -> tuple[Cell, Cell]:
        return _cell(module, "weight"), _cell(module, "bias")

    def lead(self) -> torch.Tensor:
        """The stem's weight, whose dtype and device stand for the module's."""
        return self._lead[0][self._lead[1]]

    def pair(self, name: str) -> list[torch.Tensor | None]:
        """Weight and bias of a convolution, norm or linear layer of the plan."""
        return _fetch(self.pairs[name])

    def block(self, index: int, position: int, plan: BlockPlan) -> list[Any]:
        """Arguments of one block's op."""
        return block_arguments(_fetch(self.blocks[index, position]), plan)

    def requires_grad(self) -> bool:
        """Whether any parameter wants gradients."""
        values = chain.from_iterable(map(dict.values, self._parameters))
        return any(value.requires_grad for value in values if value is not None)


class TracedProgram:
    """The same reads by attribute access, which torch.compile and torch.export can follow. Stateless, never kept."""

    def __init__(self, backbone: nn.Module, plan: BackbonePlan) -> None:
        self.plan = plan
        self.backbone = backbone

    def lead(self) -> torch.Tensor:
        return self.backbone.patch_embed.proj.weight

    def pair(self, name: str) -> list[torch.Tensor | None]:
        backbone = self.backbone
        if name == "patch_embed":
            module = backbone.patch_embed.proj
        elif name == "head":
            module = backbone.head.fc
        elif name.startswith("network."):
            module = backbone.network[int(name.removeprefix("network."))].proj
        else:
            module = getattr(backbone, name)
        return [module.weight, module.bias]

    def block(self, index: int, position: int, plan: BlockPlan) -> list[Any]:
        block = self.backbone.network[index][position]
        first = block.norm_reparam if plan.deployed else block.norm1
        affine = [None, None] if plan.deployed else [block.token_mixer.affine.weight, block.token_mixer.affine.bias]
        fc1, fc2, norm2 = block.mlp.fc1, block.mlp.fc2, block.norm2
        tensors = [block.layer_scale_1, first.weight, first.bias, *affine, norm2.weight, norm2.bias]
        tensors += [fc1.weight, fc1.bias, fc2.weight, fc2.bias, block.layer_scale_2]
        return block_arguments(tensors, plan)

    def dropping(self, index: int, position: int) -> bool:
        """Whether a dropout is active. Asked in the traced code, so that ``train()`` after compiling compiles anew."""
        block = self.backbone.network[index][position]
        drops = [module for module in (getattr(block, "drop_path", None), getattr(block.mlp, "drop", None)) if module]
        return any([drop.training and bool(getattr(drop, "p", 0) or getattr(drop, "drop_prob", 0)) for drop in drops])

    def requires_grad(self) -> bool:
        return any([parameter.requires_grad for parameter in self.backbone.parameters()])
