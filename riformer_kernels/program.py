"""An executable plan: where each parameter lies that the ops of a forward pass read.

Nothing derived from a weight is kept. A *cell* is a dictionary and a key in it, and each forward reads the parameter
through its cell. ``load_state_dict``, ``assign=True``, ``.to()``, an optimizer step, ``functional_call`` and even
``p.data.copy_()`` are therefore seen without any invalidation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from .modules import Backbone, child, owner, reach
from .network import Network
from .ops.block import BlockParameters
from .plan import BackbonePlan, BlockPlan, StagePlan, block_parameters
from .snapshot import Snapshot

Cell = tuple[dict[str, Any], str]


def _constant(value: Any) -> Cell:
    """A cell for what no module keeps: None, or a setting of the plan."""
    return {"value": value}, "value"


def _cell(module: nn.Module, name: str) -> Cell:
    """Where a module keeps a tensor. DataParallel replicas keep them as plain attributes, all others as parameters."""
    return (module._parameters, name) if name in module._parameters else (module.__dict__, name)


def _pair(module: nn.Module) -> tuple[Cell, Cell]:
    return _cell(module, "weight"), _cell(module, "bias")


def _fetch(cells: Iterable[Cell]) -> list[Any]:
    """The values of the cells. A list, as a named tuple takes twice as long to make, which a forward pass feels."""
    return [holder[name] for holder, name in cells]


def _block_cells(block: nn.Module, plan: BlockPlan) -> tuple[Cell, ...]:
    """The cells of ``BlockParameters``, field by field."""

    def cell(path: str) -> Cell:
        return _cell(*owner(block, path))

    found = block_parameters(plan, cell)
    return tuple(value if isinstance(value, tuple) else _constant(value) for value in found)


class Program:
    """A plan with the cells of its parameters. Belongs to one module; made anew when ``snapshot`` no longer holds."""

    def __init__(self, backbone: Backbone, plan: BackbonePlan) -> None:
        self.plan = plan
        self.snapshot = Snapshot(backbone)
        self.reasons = plan.reasons()
        self._blocks: dict[tuple[int, int], tuple[Cell, ...]] = {}
        self._pairs: dict[str, tuple[Cell, Cell]] = {}
        for index, item in enumerate(plan.network):
            module = backbone.network[index]
            if isinstance(item, StagePlan):
                for position, block in enumerate(item.blocks):
                    if item.reason is None and block.reason is None:
                        self._blocks[index, position] = _block_cells(module[position], block)
            elif item.reason is None:
                self._pairs[item.name] = _pair(module.proj)
        if plan.stem.reason is None:
            self._pairs[plan.stem.name] = _pair(backbone.patch_embed.proj)
        for norm in plan.norms:
            if norm.reason is None:
                self._pairs[norm.name] = _pair(child(backbone, norm.name))
        if plan.head is not None and plan.head.reason is None:
            self._pairs[plan.head.name] = _pair(backbone.head.fc)
        # A DataParallel replica keeps its tensors, non-leaves with gradients, under another name.
        store = "_former_parameters" if backbone.__dict__.get("_is_replica") else "_parameters"
        self._parameters = [module.__dict__[store] for module in backbone.modules()]
        self._lead = _cell(child(backbone, "patch_embed.proj"), "weight")
        self.network = Network(self)

    def lead(self) -> torch.Tensor:
        """The stem's weight. Its dtype and device stand for the module's, and ``.to()`` may change them."""
        return self._lead[0][self._lead[1]]

    def weight_and_bias(self, name: str) -> list[Any]:
        """Weight and bias of a convolution, norm or linear layer of the plan."""
        return _fetch(self._pairs[name])

    def block(self, index: int, position: int, plan: BlockPlan) -> Sequence[Any]:
        """The fields of ``BlockParameters`` for one block's op."""
        return _fetch(self._blocks[index, position])

    def pair_cells(self, name: str) -> tuple[Cell, Cell]:
        """The cells of weight and bias of a convolution, norm or linear layer of the plan."""
        return self._pairs[name]

    def tensor_cells(self, index: int, position: int) -> list[Cell]:
        """The cells of one block's tensors, those of ``BlockParameters`` without its settings."""
        settings = ("eps1", "eps2", "per_position", "residual", "int8")
        fields = zip(BlockParameters._fields, self._blocks[index, position], strict=True)
        return [cell for name, cell in fields if name not in settings]

    def requires_grad(self) -> bool:
        """Whether any parameter wants gradients."""
        values = chain.from_iterable(map(dict.values, self._parameters))
        return any(value.requires_grad for value in values if value is not None)


class TracedProgram:
    """The same reads by attribute access, which torch.compile and torch.export can follow. Stateless, never kept."""

    def __init__(self, backbone: Backbone, plan: BackbonePlan) -> None:
        self.plan = plan
        self.backbone = backbone

    def lead(self) -> torch.Tensor:
        return self.backbone.patch_embed.proj.weight

    def weight_and_bias(self, name: str) -> list[Any]:
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

    def block(self, index: int, position: int, plan: BlockPlan) -> Sequence[Any]:
        block = self.backbone.network[index][position]
        return block_parameters(plan, lambda path: reach(block, path))

    def dropping(self, index: int, position: int, plan: BlockPlan) -> bool:
        """Whether a dropout is active. Asked in the traced code, so that ``train()`` after compiling compiles anew."""
        block = self.backbone.network[index][position]
        assert plan.kind is not None
        drops = [reach(block, path) for path in plan.kind.drops if child(block, path) is not None]
        rates = [getattr(drop, "p", 0) or getattr(drop, "drop_prob", 0) for drop in drops if drop.training]
        return any(map(bool, rates))

    def requires_grad(self) -> bool:
        wanted = [parameter.requires_grad for parameter in self.backbone.parameters()]
        return any(wanted)
