"""What the cases of all ops share: dtypes, layouts, values, how often a small case is drawn, and grids of cases.

Golden is float64 on the values that an op is given. Eager is the model's own PyTorch code in the tested dtype and
layout. A check (`check_block`, `check_embed`, ...) compares an implementation with both. The tests of the ops and the
tests of faults go through the same checks: a check that no fault fails would be worth nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import pytest
import torch

from riformer_kernels import numerics
from riformer_kernels.dtypes import DTYPES, name_of

EPS = 1e-5
LAYOUTS = ("nchw", "channels_last", "offset", "sliced", "strided", "transposed", "expanded")

per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
per_norm = pytest.mark.parametrize("norm", ["gn", "ln"])

# -------------------------------------------------------------------------------------------------- values and layouts


def described(case: Any) -> str:
    """The fields of ``case`` that differ from their defaults, and its seed: enough to build the case again."""
    parts = []
    for field in fields(case):
        value = getattr(case, field.name)
        if value != field.default or field.name in ("dtype", "channels", "size", "seed"):
            parts.append(f"{field.name}={str(value).removeprefix('torch.')}")
    return f"{type(case).__name__}({', '.join(parts)})"


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``x`` [B, C, H, W] in another layout.

    NaN lies between them, so that a kernel that reads there shows it.
    """
    batch, channels, height, width = x.shape
    if layout == "nchw":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return x[:1].contiguous().expand(x.shape)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":
        buffer = x.new_full((x.numel() + 3,), float("nan"))
        view = buffer[3:].view(x.shape)
    elif layout == "sliced":
        buffer = x.new_full((batch, channels, height + 3, width + 2), float("nan"))
        view = buffer[:, :, 1 : height + 1, 2:]
    elif layout == "strided":
        buffer = x.new_full((batch, 2 * channels, height, 2 * width), float("nan"))
        view = buffer[:, ::2, :, ::2]
    else:
        raise ValueError(layout)
    view.copy_(x)
    return view


def draws(seed: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).to(dtype)

    return draw


def tokens(case: Any, seed: int, channels: int) -> torch.Tensor:
    draw = draws(seed, torch.float32)
    shape = (case.batch, channels, *case.size)
    values = getattr(case, "values", "normal")
    if values == "normal":
        x = draw(*shape) + draw(1, channels, 1, 1, std=0.5)
    elif values == "subnormal":
        x = draw(*shape) * (1e-5 if case.dtype == torch.float16 else 1e-39)
    else:
        x = {"small": 0.0, "mean1000": 1000.0}[values] + draw(*shape, std={"small": 3e-3, "mean1000": 1.0}[values])
    return lay_out(x.to(getattr(case, "images", None) or case.dtype), case.layout)


def like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor in the layout that a result has: channels_last where ``x`` is channels_last, NCHW otherwise."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(x.shape, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# ------------------------------------------------------------------------------------------- draws of a case, the rule

# Few values make the ratios noisy: the largest of 8 errors is often twice the largest of 8 others, with nothing wrong.
# So a case is drawn with several seeds, its parameters too, until there are this many values. The results are stacked
# along the batch, and one comparison is made of all.
POOLED = 12_000
MOST_SEEDS = 48


def seeds_of(case: Any, values: int) -> list[int]:
    if getattr(case, "values", "normal") == "subnormal":
        values = values // (case.size[0] * case.size[1])  # every position has the same result, or nearly
    count = min(MOST_SEEDS, max(1, -(-POOLED // max(values, 1))))
    return [1000 * case.seed + 2 * i for i in range(count)]


@dataclass(frozen=True)
class Expected:
    """The arguments of every draw, and the results of eager and of golden, stacked along the batch."""

    arguments: list[tuple[torch.Tensor, Any]]
    eager: torch.Tensor
    golden: torch.Tensor


class RatiosExceeded(AssertionError):
    """A figure is above its limit. ``most`` is the largest ratio in multiples of its limit, infinite for a NaN."""

    def __init__(self, message: str, ratios: numerics.ErrorRatios) -> None:
        super().__init__(message)
        figures = ("max", "rms", "channel", "position")
        found = [getattr(ratios, figure) / getattr(ratios.limits, figure) for figure in figures]
        self.most = math.inf if any(map(math.isnan, found)) else max(found)


def check_ratios(
    found: torch.Tensor, eager: torch.Tensor, golden: torch.Tensor, label: str, dtype: torch.dtype | None = None
) -> numerics.ErrorRatios:
    """The error-ratio rule of `riformer_kernels.numerics`. ``label`` names the case, so that it can be run again."""
    ratios = numerics.compare(found, eager, golden, dtype)
    if not ratios.passed:
        message = (
            f"{label}: {', '.join(ratios.exceeded)}\n  ours  {ratios.ours}\n  eager {ratios.eager}\n"
            f"  pooled over {found.shape[0]} images"
        )
        raise RatiosExceeded(message, ratios)
    return ratios


def check_again(check: Callable[[Any], None], case: Any) -> None:
    """``check(case)`` for a case that was generated: a ratio just above its limit must be so with other seeds, too.

    A search over random cases meets chance sooner or later. A norm of one channel with 18 values had a largest error
    of 2.35 times eager's with one seed; over 60 seeds the median of that ratio is 0.89. So a case whose figures are
    less than twice their limits is drawn with three other seeds, and fails when two of them fail as well.

    Raises:
        RatiosExceeded: as the first seed has it.
    """
    try:
        check(case)
    except RatiosExceeded as first:
        if first.most >= 2.0:
            raise
        if sum(_exceeds(check, replace(case, seed=case.seed + 1000 * step)) for step in (1, 2, 3)) >= 2:
            raise


def _exceeds(check: Callable[[Any], None], case: Any) -> bool:
    try:
        check(case)
    except RatiosExceeded:
        return True
    return False


# ----------------------------------------------------------------------------------------------------------- grids


@cache
def all_pairs(kind: type, limit: int, **factors: tuple) -> tuple:
    """Cases of ``kind`` in which every two values of two factors meet at least once, none with more than ``limit``
    multiply-adds (pairs that only dearer cases have are left out). Greedy, and the same on every machine."""
    chance = random.Random(0)
    names = list(factors)

    def pairs_of(case: Any) -> set:
        values = [(name, getattr(case, name)) for name in names]
        return {(values[i], values[j]) for i in range(len(names)) for j in range(i)}

    missing = {
        ((a, x), (b, y)) for i, a in enumerate(names) for b in names[:i] for x in factors[a] for y in factors[b]
    }  # fmt: skip
    cases = []
    for wanted in sorted(missing, key=repr):
        if wanted not in missing:
            continue
        tries = []
        for _ in range(120):
            case = kind(**({name: chance.choice(factors[name]) for name in names} | dict(wanted)))
            if case.work <= limit:
                tries.append(case)
        if tries:
            best = max(tries, key=lambda case: len(pairs_of(case) & missing))
            missing -= pairs_of(best)
            cases.append(replace(best, seed=len(cases)))
    return tuple(cases)
