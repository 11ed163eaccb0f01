"""Cases of ``embed``: parameters, the eager form, golden, and the check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from support_cases import Expected, check_ratios, described, draws, lay_out, seeds_of, tokens
from support_moments import check_moments

from riformer_kernels import numerics

STEM = {"kernel": (7, 7), "stride": 4, "padding": 2}
DOWNSAMPLE = {"kernel": (3, 3), "stride": 2, "padding": 1}


@dataclass(frozen=True)
class Embed:
    """A case of ``embed``; ``dtype`` is the result's."""

    in_channels: int = 3
    channels: int = 16
    kernel: tuple[int, int] = (3, 3)
    stride: int = 2
    padding: int = 1
    size: tuple[int, int] = (17, 20)
    dtype: torch.dtype = torch.float32
    images: torch.dtype | None = None  # None: as the result
    parameters: torch.dtype | None = None
    layout: str = "nchw"
    weight_layout: str = "nchw"
    bias: bool = True
    batch: int = 3
    seed: int = 0

    @property
    def work(self) -> int:
        area = (self.size[0] // self.stride + 1) * (self.size[1] // self.stride + 1)
        return self.in_channels * self.channels * self.kernel[0] * self.kernel[1] * area * self.batch

    def __str__(self) -> str:
        return described(self)


def embed_parameters(case: Embed, seed: int) -> dict[str, Any]:
    draw = draws(seed + 1, case.parameters or case.dtype)
    fan = case.in_channels * case.kernel[0] * case.kernel[1]
    weight = draw(case.channels, case.in_channels, *case.kernel, std=fan**-0.5)
    bias = draw(case.channels, std=0.25) if case.bias else None
    return {"weight": lay_out(weight, case.weight_layout), "bias": bias, "stride": case.stride, "padding": case.padding}


def eager_embed(x: torch.Tensor, parameters: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    bias = None if parameters["bias"] is None else parameters["bias"].to(dtype)
    weight = parameters["weight"].to(dtype)
    return F.conv2d(x.to(dtype), weight, bias, parameters["stride"], parameters["padding"])


@lru_cache(maxsize=32)
@torch.no_grad()
def expected_embed(case: Embed) -> Expected:
    height, width = (
        (side + 2 * case.padding - taps) // case.stride + 1 for side, taps in zip(case.size, case.kernel, strict=True)
    )
    values = case.batch * case.channels * height * width
    arguments = [(tokens(case, s, case.in_channels), embed_parameters(case, s)) for s in seeds_of(case, values)]
    golden = [eager_embed(x.contiguous(), p, torch.float64) for x, p in arguments]
    plain = arguments
    if case.kernel not in ((7, 7), (3, 3)):
        # For a 3x5 kernel oneDNN's sum has 1.5x less error in channels_last than in NCHW, so that NCHW judges both.
        # For the model's two kernels our error is less than either, and the case's own layout is kept.
        plain = [(x.contiguous(), {**p, "weight": p["weight"].contiguous()}) for x, p in arguments]
    return Expected(arguments, torch.cat([eager_embed(x, p, case.dtype) for x, p in plain]), torch.cat(golden))


def check_embed(run: Callable[..., Any], case: Embed, label: str = "") -> numerics.ErrorRatios:
    """``run(x, parameters, dtype) -> (out, moments)`` on every draw of ``case``."""
    label = f"{label}: {case}"
    expected = expected_embed(case)
    found = []
    for x, parameters in expected.arguments:
        before = x.clone()
        out, moments = run(x, parameters, case.dtype)
        assert torch.equal(x, before), f"{label}: x was written to"
        assert out.dtype == case.dtype and out.is_contiguous(), f"{label}: {out.dtype}, strides {out.stride()}"
        check_moments(moments, out, label)
        found.append(out)
    return check_ratios(torch.cat(found), expected.eager, expected.golden, label)
