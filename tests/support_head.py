"""Cases of ``head``: parameters, the eager form, and the check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from support_block import Block
from support_cases import EPS, Expected, check_ratios, draws, tokens
from support_norm import eager_norm

POOLED = 6000  # scores


@dataclass(frozen=True)
class Head:
    """A case of ``head``: tokens as of a block, the number of classes, and the result's dtype."""

    tokens: Block
    classes: int
    out: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.tokens}, {self.classes} classes" + (f" to {self.out}" if self.out else "")


def eager_head(x: torch.Tensor, p: list[torch.Tensor | None], per_position: bool) -> torch.Tensor:
    """As the model's norm and ClassifierHead compute it."""
    weight, bias, fc_weight, fc_bias = (None if v is None else v.to(x.dtype) for v in p)
    return F.linear(eager_norm(x, weight, bias, EPS, per_position).mean((-2, -1)), fc_weight, fc_bias)


def head_parameters(
    channels: int, classes: int, dtype: torch.dtype, seed: int, bias: bool = True
) -> list[torch.Tensor | None]:
    draw = draws(seed + 1, dtype)
    return [
        draw(channels, std=0.25, mean=1.0), draw(channels, std=0.25), draw(classes, channels, std=channels**-0.5),
        draw(classes, std=0.25) if bias else None,
    ]  # fmt: skip


@lru_cache(maxsize=32)
@torch.no_grad()
def expected_head(case: Any, classes: int, out_dtype: torch.dtype, bias: bool) -> Expected:
    """A batch has few scores: draws are pooled until there are enough."""
    flag = case.norm == "ln"
    arguments, eager, golden = [], [], []
    draw_count = min(64, -(-POOLED // (case.batch * classes)))
    for seed in range(case.seed, case.seed + 2 * draw_count, 2):
        x = tokens(case, seed, case.channels)
        p = head_parameters(case.channels, classes, case.parameters or case.dtype, seed, bias)
        arguments.append((x, p))
        eager.append(eager_head(x, p, flag).to(out_dtype))
        golden.append(eager_head(x.double(), [None if v is None else v.double() for v in p], flag))
    return Expected(arguments, torch.cat(eager), torch.cat(golden))


def check_head(
    run: Callable[..., Any],
    case: Any,
    classes: int,
    label: str,
    out_dtype: torch.dtype | None = None,
    bias: bool = True,
) -> None:
    """``run(x, parameters, per_position, out_dtype) -> scores`` on every draw of ``case``.

    ``case`` is a `support_block.Block`, of which the tokens and the norm count. Few images or classes of few channels
    are left out: there MKL computes eager's matrix product with dot products, whose error is 1.4 times less than with
    more of them.
    """
    expected = expected_head(case, classes, out_dtype or case.dtype, bias)
    found = []
    for x, p in expected.arguments:
        before = x.clone()
        out = run(x, p, case.norm == "ln", out_dtype)
        assert torch.equal(x, before), f"{label}: x was written to"
        assert out.dtype == (out_dtype or x.dtype) and out.shape == (case.batch, classes) and out.is_contiguous()
        found.append(out)
    text = f"{label}: head {case}, {classes} classes to {out_dtype}"
    check_ratios(torch.cat(found), expected.eager, expected.golden, text)
