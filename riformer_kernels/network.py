"""A backbone as one call: where every part is fused, a backend may run the whole network at once.

The result is that of the ops one after the other, to the bit. What it saves is measured in
bench/notes/2026-11-21-cpu-network.md. A backend that offers it has a ``network`` function; ``forward.run`` uses it
when nothing watches or changes single parts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch

from .plan import BackbonePlan, StagePlan

if TYPE_CHECKING:
    from .program import Cell, Program

# The kinds of parts, as csrc/cpu/network_bindings.cpp numbers them.
EMBED, BLOCK, NORM, HEAD = range(4)


class Description:
    """The parts of a network in order, and the arguments of their ops by type."""

    def __init__(self) -> None:
        self.kinds: list[int] = []
        self.cells: list[Cell] = []
        self.integers: list[int] = []
        self.reals: list[float] = []

    def add(self, kind: int, cells: Sequence[Cell], integers: Sequence[int], reals: Sequence[float] = ()) -> None:
        self.kinds.append(kind)
        self.cells += cells
        self.integers += integers
        self.reals += reals


def describe(program: Program) -> Description | None:
    """The network of a program; None where a part is not fused, or the parts do not follow each other as they do in
    every RIFormer: embeddings, each with blocks behind it and perhaps a norm behind these."""
    plan = program.plan
    if program.reasons or not _is_regular(plan):
        return None
    found = Description()
    norms = {norm.index: norm for norm in plan.norms}
    found.add(EMBED, program.pair_cells(plan.stem.name), (plan.stem.stride, plan.stem.padding))
    for index, item in enumerate(plan.network):
        if not isinstance(item, StagePlan):
            found.add(EMBED, program.pair_cells(item.name), (item.stride, item.padding))
            continue
        for position, block in enumerate(item.blocks):
            cells = program.tensor_cells(index, position)
            found.add(BLOCK, cells, (block.per_position,), (block.eps1, block.eps2))
        if index in norms and plan.head is None:
            norm = norms[index]
            found.add(NORM, program.pair_cells(norm.name), (norm.per_position,), (norm.eps,))
    if plan.head is not None:
        norm = norms[len(plan.network) - 1]
        pairs = (*program.pair_cells(norm.name), *program.pair_cells(plan.head.name))
        found.add(HEAD, pairs, (norm.per_position,), (norm.eps,))
    return found


def _is_regular(plan: BackbonePlan) -> bool:
    stages = {index for index, item in enumerate(plan.network) if isinstance(item, StagePlan)}
    kinds = [block.kind for index in stages for block in plan.network[index].blocks]  # type: ignore[union-attr]
    return (
        all(kind is not None and kind.fuses_first_half for kind in kinds)
        # A norm is that of the last stage before an embedding.
        and all(norm.index in stages and norm.index + 1 not in stages for norm in plan.norms)
        # The head takes the tokens of the last part.
        and (plan.head is None or len(plan.network) - 1 in {norm.index for norm in plan.norms})
    )


class Prepared:
    """A network that a backend has been told of, with the parameters that it was told of.

    Attributes:
        values: the parameters, in the order of the description's cells.
        run: ``run(images, tokens_dtype, features_dtype, scores_dtype)`` returns the features, or the scores alone.
    """

    def __init__(self, values: list[Any], run: Callable[..., list[torch.Tensor]], release: Callable[[], None]) -> None:
        self.values = values
        self.run = run
        weakref.finalize(self, release).atexit = False  # what the process still holds at its end needs no release


class Network:
    """The description of a program's network, and what was last prepared from it."""

    def __init__(self, program: Program) -> None:
        self._description = describe(program)
        self._prepared: Prepared | None = None

    def prepared(self, prepare: Callable[..., Prepared]) -> Prepared | None:
        """What runs the network with the parameters as they are now; None where it has to run part by part.

        Parameters are compared by identity. What their memory holds, and where it lies, is read in every call.
        """
        description = self._description
        if description is None:
            return None
        values = [holder[name] for holder, name in description.cells]
        prepared = self._prepared
        if prepared is None or not all(map(is_, values, prepared.values)):
            plain = (torch.Tensor, torch.nn.Parameter)
            if not all(value is None or type(value) in plain for value in values):
                return None  # a subclass may mean something by what the ops do
            prepared = prepare(description.kinds, values, description.integers, description.reals)
            self._prepared = prepared  # one assignment: another thread sees the old one or the new one, both complete
        return prepared


def watched(x: torch.Tensor) -> bool:
    """Whether somebody wants to see single ops: a tensor subclass, a dispatch mode or a transform of functions."""
    return (
        type(x) is not torch.Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
