"""Cases of ``norm``: parameters, the eager form, and the check."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from support_cases import EPS, Expected, check_ratios, draws, like, seeds_of, tokens


def eager_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, per_position: bool
) -> torch.Tensor:
    """As the model's `make_norm` has it."""
    if not per_position:
        return F.group_norm(x, 1, weight, bias, eps)
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)


def norm_parameters(channels: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = draws(seed + 1, dtype)
    return draw(channels, std=0.25, mean=1.0), draw(channels, std=0.25)


@lru_cache(maxsize=32)
@torch.no_grad()
def expected_norm(case: Any, out_dtype: torch.dtype) -> Expected:
    flag = case.norm == "ln"
    arguments, eager, golden = [], [], []
    for seed in seeds_of(case, case.batch * case.channels * case.size[0] * case.size[1]):
        x = tokens(case, seed, case.channels)
        weight, bias = norm_parameters(case.channels, case.parameters or case.dtype, seed)
        arguments.append((x, (weight, bias)))
        eager.append(eager_norm(x, weight.to(x.dtype), bias.to(x.dtype), EPS, flag).to(out_dtype))
        golden.append(eager_norm(x.double(), weight.double(), bias.double(), EPS, flag))
    return Expected(arguments, torch.cat(eager), torch.cat(golden))


def check_norm(run: Callable[..., Any], case: Any, label: str, out_dtype: torch.dtype | None = None) -> None:
    """``run(x, weight, bias, eps, per_position, out_dtype) -> out`` on every draw of ``case``.

    ``case`` is a `support_block.Block`, of which the tokens and the norm count.
    """
    expected = expected_norm(case, out_dtype or case.dtype)
    found = []
    for x, parameters in expected.arguments:
        before = x.clone()
        out = run(x, *parameters, EPS, case.norm == "ln", out_dtype)
        assert torch.equal(x, before), f"{label}: x was written to"
        assert out.dtype == (out_dtype or x.dtype) and out.stride() == like(x).stride()
        found.append(out)
    check_ratios(torch.cat(found), expected.eager, expected.golden, f"{label}: norm {case} to {out_dtype}")
