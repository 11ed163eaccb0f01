"""Is a module's ``forward`` the expected function? Asked of the module itself, with random parameters in float64.

Structure cannot tell: a subclass may have the same children and another ``forward``. So a probe runs a module once, in
float64, on a small random input and with random *hard* parameters in place of its own (layer scale near 0.5), and
compares the result with the reference of the op that would replace the module. Tanh GELU, another eps, a per-position
norm in place of GroupNorm or a changed ``forward`` differ by orders of magnitude more than float64 rounding. Modules of
the same classes, sizes and settings are probed once; their answer is kept.

Probes run on a twin of the module (``twin.py``), so other threads may go on using the module itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import algebra, ops
from .block_kind import first_half
from .modules import Backbone, child
from .plan import BackbonePlan, BlockPlan, EmbedPlan, HeadPlan, NormPlan, StagePlan, block_parameters
from .twin import twin_of

TOLERANCE = 1e-9
REMEMBERED = 256
_answers: dict[tuple, str | None] = {}


def _hard(module: nn.Module, generator: torch.Generator) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A float64 twin with random parameters, drawn on the CPU, and the parameters by name."""
    values = {}

    def draw(name: str, parameter: torch.Tensor) -> torch.Tensor:
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        value = value / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.5 + 0.3 * value
        values[name] = value.to(parameter.device)
        return values[name]

    return twin_of(module, draw, torch.float64), values


def _tokens(channels: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Two images [2, C, 2, 3] with a mean; the second one's variance is near eps, where a wrong eps shows."""
    x = torch.randn((2, channels, 2, 3), generator=generator, dtype=torch.float64) + 0.5
    x[1] *= 3e-3
    return x.to(device)


def _differs(found: Any, expected: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return True
    return not torch.allclose(found.to(expected.dtype), expected, rtol=TOLERANCE, atol=TOLERANCE)


def _probe_block(block: nn.Module, plan: BlockPlan, generator: torch.Generator) -> str | None:
    twin, values = _hard(block, generator)
    x = _tokens(plan.channels, generator, _device(block))
    found = twin.forward(x)
    assert plan.kind is not None
    start = x if plan.kind.fuses_first_half else first_half(plan.kind, twin, x)
    expected, _ = ops.block.reference(start, algebra.moments_of(start), *block_parameters(plan, values.get))
    if _differs(found, expected):
        return f"forward of {type(block).__name__} (or of a module in it) does not compute a RIFormer block"
    return None


def _probe_norm(norm: nn.Module, plan: NormPlan, generator: torch.Generator) -> str | None:
    twin, values = _hard(norm, generator)
    x = _tokens(plan.channels, generator, _device(norm))
    found = twin.forward(x)
    expected = ops.norm.reference(
        x, algebra.moments_of(x), values["weight"], values["bias"], plan.eps, plan.per_position, torch.float64
    )
    if _differs(found, expected):
        expected_norm = "LayerNorm per position" if plan.per_position else "GroupNorm(1)"
        return f"forward of {type(norm).__name__} does not compute {expected_norm}"
    return None


def _probe_embed(module: nn.Module, plan: EmbedPlan, generator: torch.Generator) -> str | None:
    twin, values = _hard(module, generator)
    size = (2, plan.in_channels, plan.kernel[0] + plan.stride, plan.kernel[1])
    x = torch.randn(size, generator=generator, dtype=torch.float64).to(_device(module))
    found = twin.forward(x)
    expected = nn.functional.conv2d(x, values["proj.weight"], values.get("proj.bias"), plan.stride, plan.padding)
    if _differs(found, expected):
        return f"forward of {type(module).__name__} does not compute its convolution"
    return None


def _probe_head(head: nn.Module, plan: HeadPlan, generator: torch.Generator) -> str | None:
    twin, values = _hard(head, generator)
    x = _tokens(plan.channels, generator, _device(head))
    found = twin.forward((torch.zeros_like(x), x))
    if _differs(found, nn.functional.linear(x.mean((2, 3)), values["fc.weight"], values.get("fc.bias"))):
        return f"forward of {type(head).__name__} does not compute fc(mean of the last features)"
    return None


def _probe(module: nn.Module, plan: Any, ask: Callable[..., str | None]) -> str | None:
    """The answer for this combination of classes, sizes and settings, from memory if it was asked before."""
    settings = tuple(value for field, value in vars(plan).items() if field not in ("name", "index", "role"))
    names = tuple((name, parameter.shape) for name, parameter in module.named_parameters())
    key = (ask.__name__, *(type(inner) for inner in module.modules()), settings, names)
    if key not in _answers:
        generator = torch.Generator().manual_seed(0)
        try:
            with (
                torch.no_grad(),
                torch.autocast(_device(module).type, enabled=False),
                torch.random.fork_rng(devices=[]),
            ):
                answer = ask(module, plan, generator)
        except Exception as error:
            answer = f"forward of {type(module).__name__} fails on tokens [B, C, H, W]: {error}"
        if len(_answers) >= REMEMBERED:
            _answers.clear()
        _answers[key] = answer
    return _answers[key]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def refusals(backbone: Backbone, plan: BackbonePlan) -> dict[str, str]:
    """Name and reason of the parts that have the structure but not the expected ``forward``."""
    refused: dict[str, str] = {}

    def record(part: Any, module: nn.Module, ask: Callable[..., str | None]) -> None:
        if part.reason is None:
            reason = _probe(module, part, ask)
            if reason:
                refused[part.name] = reason

    record(plan.stem, backbone.patch_embed, _probe_embed)
    for item, module in zip(plan.network, backbone.network, strict=True):
        if not isinstance(item, StagePlan):
            record(item, module, _probe_embed)
        elif item.reason is None:
            for block, inner in zip(item.blocks, module, strict=True):
                record(block, inner, _probe_block)
    for norm in plan.norms:
        if norm.reason is None:
            record(norm, child(backbone, norm.name), _probe_norm)
    if plan.head is not None:
        record(plan.head, backbone.head, _probe_head)
    return refused
