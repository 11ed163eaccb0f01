"""Verification: is the patched model as accurate as the original, judged by float64 and by eager PyTorch's own error?

Two kinds of comparison, both by the error-ratio rule of ``numerics``:

- the whole network on one seeded batch, per feature map and for the logits;
- the branch of every fused block, ``MLP(norm2(x + mixer(norm1(x))))`` with both layer scales at 1 and without the
  residual. With the usual layer scale of 1e-5 a broken block is invisible in its output; in its branch it is not.

Golden is the original forward in float64 on the model's own parameters, eager the same in the tested dtype
(``compute_dtype``: parameters cast to it) with contiguous tensors. Ratios of small samples scatter, so a comparison
that exceeds a limit is repeated on five more batches. It fails when the six together exceed a limit and more than half
of them exceed one on their own: chance passes, a defect stays. (Measured: of 3840 healthy models with two classes and
at most 64 channels, 19 exceed a limit on one batch, 4 on six together, none by this rule.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from . import numerics
from .backends import Backend
from .block_kind import mixed, mlp_branch
from .dtypes import name_of, token_dtype
from .errors import VerificationError
from .forward import run
from .modules import STATE, Backbone, original_class
from .ops.block import BlockParameters
from .patch_state import PatchState
from .plan import BackbonePlan, BlockPlan, StagePlan
from .precision import convolutions_like_products
from .program import Program
from .twin import in_dtype

BATCH = 2
IMAGE = 96
BRANCH_POSITIONS = (7, 9)
MORE_BATCHES = 5
CLASSES = 256
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ours, eager, golden


@dataclass(frozen=True)
class Comparison:
    """One comparison.

    Attributes:
        name: what was compared.
        batches: over how many batches.
        exceeding: how many of these exceed a limit on their own.
        ratios: those of all batches together.
    """

    name: str
    batches: int
    exceeding: int
    ratios: numerics.ErrorRatios

    @property
    def passed(self) -> bool:
        return self.ratios.passed or 2 * self.exceeding <= self.batches

    @property
    def failure(self) -> str:
        return f"EXCEEDS {', '.join(self.ratios.exceeded)}; {self.exceeding} of {self.batches} batches do"

    def as_dict(self) -> dict[str, Any]:
        figures = {**self.ratios.as_dict(), "passed": self.passed}
        return {"name": self.name, "batches": self.batches, "exceeding": self.exceeding, **figures}


@dataclass(frozen=True)
class Verification:
    """All comparisons of one backbone.

    Attributes:
        dtype: the tested dtype, as text.
        shape: shape of the seeded batch.
        network: per feature map ("norm6") and for the logits ("head").
        branches: per fused block.
        note: what was left out, and why, or None.
    """

    dtype: str
    shape: tuple[int, ...]
    network: tuple[Comparison, ...]
    branches: tuple[Comparison, ...]
    note: str | None = None

    @property
    def passed(self) -> bool:
        return all(item.passed for item in (*self.network, *self.branches))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def summary(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return f"{verdict} in {self.dtype} on {list(self.shape)}; error against float64, and as a multiple of eager's"

    def lines(self, failed_only: bool = False) -> list[str]:
        """Aligned text: the network, and the worst of the branches (all that failed with ``failed_only``)."""
        if failed_only:
            shown = [item for item in (*self.network, *self.branches) if not item.passed]
        else:
            worst = sorted(self.branches, key=lambda item: (item.passed, -item.ratios.rms))[:1]
            shown = [*self.network, *worst]
        lines = []
        for item in shown:
            r = item.ratios
            branch = " (branch)" if failed_only else f" (branch, worst of {len(self.branches)})"
            kind = "" if item in self.network else branch
            text = f"rms {r.ours.rms:.2e} ({r.rms:.2f}x)  max {r.ours.max:.2e} ({r.max:.2f}x)"
            text += f"  channel {r.channel:.2f}x  position {r.position:.2f}x"
            lines.append(f"  {item.name}{kind}: {text}" + ("" if item.passed else f"  {item.failure}"))
        return lines + ([f"  note: {self.note}"] if self.note and not failed_only else [])


def verify(module: nn.Module) -> Verification:
    """Compare a patched backbone with its original forward.

    Leaves no trace: RNG state, training flags, gradients, buffers, parameters and their versions stay as they are, and
    the user's hooks do not fire.

    Args:
        module: a patched backbone (``riformer_kernels.fused.FusedBackbone``).
    """
    backbone = cast("Backbone", module)
    state: PatchState = backbone.__dict__[STATE]
    program = state.program_for(backbone)
    lead = program.lead()
    dtype = state.compute_dtype or lead.dtype
    shape = (BATCH, program.plan.stem.in_channels or lead.shape[1], *_image_size(program.plan))
    off = torch.autocast(lead.device.type, enabled=False)
    # By default eager's convolutions use TF32 on a GPU. Its error is no yardstick for float32 products.
    alike = convolutions_like_products(lead.device)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), off, alike:
        note = _random_parts(program)
        network = () if note else _network(backbone, program, state, dtype, shape)
        branches = tuple(_branches(backbone, program, state.backend_for(lead.device, dtype), dtype))
    return Verification(name_of(dtype), shape, network, branches, note)


def _image_size(plan: BackbonePlan) -> tuple[int, int]:
    """96 x 96, or what leaves at least 3 x 3 positions at the end of a network with larger strides."""
    total = plan.stem.stride or 1
    for item in plan.network:
        if not isinstance(item, StagePlan):
            total *= item.stride or 1
    side = max(IMAGE, 3 * total)
    return side, side


def _random_parts(program: Program) -> str | None:
    active = [name for name, reason in program.reasons.items() if "active while training" in reason]
    if not active:
        return None
    return f"whole network not compared: dropout is active in {len(active)} unfused blocks, so its output is random"


def _seeded(shape: tuple[int, ...], seed: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Normal values, drawn in float32 on the CPU and rounded to the tested dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=like.device, dtype=token_dtype(dtype))


def _judge(
    names: list[str], sample: Callable[[int], list[Triple]], limits: list[numerics.ErrorFigures]
) -> Iterator[Comparison]:
    """Compare (ours, eager, golden) of batch 0; where a limit is exceeded, of more batches, see above."""
    batches = [sample(0)]
    results = [numerics.compare(*values, limits=kind) for values, kind in zip(batches[0], limits, strict=True)]
    if not all(result.passed for result in results):
        batches += [sample(seed) for seed in range(1, 1 + MORE_BATCHES)]
    for index, (name, result) in enumerate(zip(names, results, strict=True)):
        if result.passed:
            yield Comparison(name, 1, 0, result)
            continue
        singly = [numerics.compare(*batch[index], limits=limits[index]) for batch in batches]
        ours, eager, golden = (torch.cat(tensors) for tensors in zip(*(batch[index] for batch in batches), strict=True))
        exceeding = sum(not single.passed for single in singly)
        yield Comparison(name, len(batches), exceeding, numerics.compare(ours, eager, golden, limits=limits[index]))


def _network(
    backbone: Backbone, program: Program, state: PatchState, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[Comparison, ...]:
    lead, plan = program.lead(), program.plan
    # Ours shares the parameters and has copies of the buffers.
    kinds = (lead.dtype, token_dtype(dtype), torch.float64)
    twins = [cast("Backbone", in_dtype(backbone, kind)) for kind in kinds]
    ours_twin, eager_twin, golden_twin = twins
    twin_program = Program(ours_twin, plan)
    names = [norm.name for norm in plan.norms] + (["head"] if plan.head is not None else [])
    # A classifier's features are compared too: what its average pooling hides shows there.
    headless = Program(ours_twin, replace(plan, head=None))
    outputs = tuple(norm.index for norm in plan.norms)

    def sample(seed: int) -> list[Triple]:
        x = _seeded(shape, seed, lead, dtype)
        for name, value in _wide_classifier(backbone, plan, seed).items():
            for twin, kind in zip(twins, kinds, strict=True):
                twin.head.fc._parameters[name] = value.to(kind)
        ours = _as_tuple(run(ours_twin, twin_program, state, x.to(lead.dtype)))
        eager, golden = _as_tuple(eager_twin.forward(x)), _as_tuple(golden_twin.forward(x.double()))
        if [value.shape for value in ours] != [value.shape for value in eager]:
            raise _wrong_structure(backbone, ours, eager)
        triples = list(zip(ours, eager, golden, strict=True))
        if plan.head is None:
            return triples
        features = run(ours_twin, headless, state, x.to(lead.dtype))
        eager_features, golden_features = _features(eager_twin, x, outputs), _features(golden_twin, x.double(), outputs)
        return [*zip(features, eager_features, golden_features, strict=True), *triples]

    limits = [numerics.limits_for(dtype, "logits" if name == "head" else "features") for name in names]
    return tuple(_judge(names, sample, limits))


def _wide_classifier(backbone: Backbone, plan: BackbonePlan, seed: int) -> dict[str, torch.Tensor]:
    """The classifier with random rows of the same size added up to CLASSES, rounded to its dtype.

    The error of two or ten logits is a matter of luck in either direction: measured, one healthy two-class model in 190
    exceeded a limit. All rows are alike to the op, so more of them, others with each batch, make the figures firm.
    """
    fc = None if plan.head is None or plan.head.reason is not None else backbone.head.fc
    if fc is None or fc.weight.shape[0] >= CLASSES:
        return {}
    generator = torch.Generator().manual_seed(seed)
    wide = {}
    for name, value in fc.named_parameters():
        size = value.detach().double().square().mean().sqrt()
        rows = torch.randn((CLASSES - value.shape[0], *value.shape[1:]), generator=generator, dtype=torch.float64)
        wide[name] = torch.cat((value.detach(), (rows.to(value.device) * size).to(value.dtype)))
    return wide


def _features(backbone: Backbone, x: torch.Tensor, outputs: tuple[int, ...]) -> list[torch.Tensor]:
    """The features at ``outputs``, by the backbone's own modules."""
    x = backbone.patch_embed(x)
    found = []
    for index, stage in enumerate(backbone.network):
        x = stage(x)
        if index in outputs:
            found.append(getattr(backbone, f"norm{index}")(x))
    return found


def _wrong_structure(backbone: Backbone, ours: tuple[Any, ...], eager: tuple[Any, ...]) -> VerificationError:
    return VerificationError(
        f"forward of {original_class(backbone).__name__} is not a RIFormer's: it returns {_shapes(eager)}, the fused "
        f"forward {_shapes(ours)}. Patch the inner backbone instead, or restore the class's own forward"
    )


def _shapes(values: tuple[Any, ...]) -> str:
    return ", ".join(str(list(value.shape)) for value in values)


def _as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def _branches(backbone: Backbone, program: Program, backend: Backend, dtype: torch.dtype) -> Iterator[Comparison]:
    for index, stage in enumerate(program.plan.network):
        if not isinstance(stage, StagePlan) or stage.reason is not None:
            continue
        for position, plan in enumerate(stage.blocks):
            if plan.reason is None:
                block = backbone.network[index][position]
                parameters = BlockParameters(*program.block(index, position, plan))
                yield from _branch_of(block, plan, parameters, backend, dtype)


def _branch_of(
    block: nn.Module, plan: BlockPlan, parameters: BlockParameters, backend: Backend, dtype: torch.dtype
) -> Iterator[Comparison]:
    kind = plan.kind
    assert kind is not None
    ones = torch.ones_like(parameters.norm2_weight)
    scale = ones if kind.fuses_first_half else None
    int8 = dtype == torch.int8
    parameters = parameters._replace(layer_scale_1=scale, layer_scale_2=None, residual=False, int8=int8)
    eager_twin, golden_twin = in_dtype(block, token_dtype(dtype)), in_dtype(block, torch.float64)

    def sample(seed: int) -> list[Triple]:
        x = _seeded((BATCH, plan.channels, *BRANCH_POSITIONS), seed, ones, dtype)
        y = x + mixed(kind, eager_twin, x)
        start = x if kind.fuses_first_half else y
        moments = None if plan.per_position else backend.ops["moments"](start)
        ours, _ = backend.ops["block"](start, moments, *parameters)
        eager = mlp_branch(kind, eager_twin, y)
        golden = mlp_branch(kind, golden_twin, x.double() + mixed(kind, golden_twin, x.double()))
        return [(ours, eager, golden)]

    yield from _judge([plan.name], sample, [numerics.limits_for(dtype, "branch")])
