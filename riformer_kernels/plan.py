"""The plan of a backbone: what each part computes and, where it cannot be fused, why not. Plain data, no modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .block_kind import BlockKind, tensor_paths
from .ops.block import BlockParameters


@dataclass(frozen=True)
class EmbedPlan:
    """The stem or a downsampling convolution. ``reason``: why it cannot be fused, None when it can."""

    name: str
    role: str  # "stem" or "downsample"
    in_channels: int
    channels: int
    kernel: tuple[int, int]
    stride: int
    padding: int
    reason: str | None


@dataclass(frozen=True)
class BlockPlan:
    """One block. ``per_position``: LayerNorm over the channels of each position, in place of GroupNorm(1)."""

    name: str
    kind: BlockKind | None  # None when the module is no known block; then there is a reason
    channels: int
    hidden: int
    per_position: bool
    eps1: float
    eps2: float
    reason: str | None


def block_parameters(plan: BlockPlan, read: Callable[[str], Any]) -> BlockParameters:
    """The parameters of a block's op; ``read(path)`` gives the tensor that the block keeps at a path."""
    assert plan.kind is not None, "only a block of a known kind has parameters"
    tensors: dict[str, Any] = {
        name: None if path is None else read(path) for name, path in tensor_paths(plan.kind).items()
    }
    return BlockParameters(**tensors, eps1=plan.eps1, eps2=plan.eps2, per_position=plan.per_position, residual=True)


def own_first_half(plan: BlockPlan) -> str | None:
    """What the report says of a block whose second half alone the op computes; None for every other block."""
    if plan.reason is not None or plan.kind is None or plan.kind.fuses_first_half:
        return None
    return f"first half runs its own modules ({plan.kind.name})"


@dataclass(frozen=True)
class StagePlan:
    """A sequence of blocks. ``reason`` concerns the sequence itself; then no block of it is fused."""

    name: str
    blocks: tuple[BlockPlan, ...]
    reason: str | None


@dataclass(frozen=True)
class NormPlan:
    """The norm of the features at position ``index`` of the network."""

    name: str
    index: int
    channels: int
    per_position: bool
    eps: float
    reason: str | None


@dataclass(frozen=True)
class HeadPlan:
    """Average pooling and the classifier ``head.fc`` of the module itself."""

    name: str
    channels: int
    classes: int
    reason: str | None


Part = TypeVar("Part", EmbedPlan, BlockPlan, NormPlan, HeadPlan)


@dataclass(frozen=True)
class BackbonePlan:
    """Everything ``forward`` does, in order; ``norms`` holds one entry per output, keyed by position."""

    stem: EmbedPlan
    network: tuple[StagePlan | EmbedPlan, ...]
    norms: tuple[NormPlan, ...]
    head: HeadPlan | None

    def parts(self) -> Iterator[EmbedPlan | BlockPlan | NormPlan | HeadPlan]:
        """Every part that is fused or not, in order; a stage's reason is passed on to its blocks."""
        yield self.stem
        for item in self.network:
            if isinstance(item, StagePlan):
                for block in item.blocks:
                    yield block if item.reason is None or block.reason else replace(block, reason=item.reason)
            else:
                yield item
        yield from self.norms
        if self.head is not None:
            yield self.head

    def reasons(self) -> dict[str, str]:
        """Name of each part that cannot be fused (relative to the backbone), and why."""
        return {part.name: part.reason for part in self.parts() if part.reason is not None}

    def refuse(self, refused: dict[str, str]) -> BackbonePlan:
        """The same plan with the parts named in ``refused`` (name to reason) marked as not fusable."""
        if not refused:
            return self

        def mark(part: Part) -> Part:
            return replace(part, reason=refused[part.name]) if part.name in refused and part.reason is None else part

        network = tuple(
            replace(item, blocks=tuple(mark(block) for block in item.blocks))
            if isinstance(item, StagePlan)
            else mark(item)
            for item in self.network
        )
        norms = tuple(mark(norm) for norm in self.norms)
        head = None if self.head is None else mark(self.head)
        if head is not None and head.reason is None and norms[-1].reason is not None:
            head = replace(head, reason="the norm before it is not fused")
        return BackbonePlan(mark(self.stem), network, norms, head)
