"""GELU in the native kernels, value by value, and the table that some of them use."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support_cpu import OPS, per_isa
from support_paths import ROOT

COMMON = ROOT / "csrc" / "common"


def gelu_of_kernels(x: torch.Tensor) -> torch.Tensor:
    """GELU of a vector, as the block op computes it: unit norm, unit weights, no residual."""
    channels = 8
    padded = torch.zeros((channels, -(-x.numel() // channels)), dtype=x.dtype)
    padded.view(-1)[: x.numel()] = x
    tokens = padded[None, :, :, None].contiguous()
    positions = tokens.shape[2]
    # A mean of 0 and a variance of 1 by decree: the normed tokens are the tokens.
    moments = torch.stack((torch.zeros(1, channels), torch.full((1, channels), float(positions))), dim=1)
    one, zero, eye = (
        torch.ones(channels, dtype=x.dtype),
        torch.zeros(channels, dtype=x.dtype),
        torch.eye(channels, dtype=x.dtype),
    )
    out, _ = OPS.block(
        tokens, moments, None, None, None, None, None, 0.0, one, zero, 0.0, eye, None, eye, None, None, False, False
    )
    return out.reshape(-1)[: x.numel()]


def exact(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x) in float64, without the cancellation of 1 + erf."""
    wide = x.double()
    return wide * torch.special.erfc(-wide / 2**0.5) / 2


def all_bfloat16() -> torch.Tensor:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # Above 1e30 the identity product of the other lanes would be inf * 0.
    return values[values.isfinite() & (values.abs() < 1e30) & ((values.abs() > 1e-37) | (values == 0))]


@per_isa
def test_every_bfloat16(isa: str) -> None:
    x = all_bfloat16()
    found = gelu_of_kernels(x).double()
    # Twice rounded, to the hidden channel and to the result (the second changes nothing); on top of half an ulp, what
    # either approximation is off by: 1.5e-5, and 1.2e-4 relative near zero.
    error, size = (found - exact(x)).abs(), exact(x).abs()
    excess = error - size * 2.0**-8
    assert excess.max().item() < 2.6e-5
    near = x.abs() < 0.05
    assert (error[near] <= size[near] * (2.0**-8 + 2e-4)).all()


@per_isa
def test_float32(isa: str) -> None:
    x = torch.cat((torch.linspace(-9, 9, 400_001), torch.logspace(-30, 1.3, 20_000), -torch.logspace(-30, 1.3, 20_000)))
    found = gelu_of_kernels(x).double()
    error, size = (found - exact(x)).abs(), exact(x).abs()
    # Measured: 2e-9 beside 1.8e-7 of the value with the table, 3.3e-8 beside 3e-7 with the polynomials.
    assert (error <= 3e-7 * size + 4e-8).all()
    near = x.abs() < 0.5
    assert (error[near] <= 5e-7 * size[near]).all()
    eager = (torch.nn.functional.gelu(x).double() - exact(x)).abs()
    assert error.square().mean().sqrt() <= 1.25 * eager.square().mean().sqrt()


@per_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays(isa: str, dtype: torch.dtype) -> None:
    x = torch.full((8 * 64,), float("nan"), dtype=dtype)
    assert gelu_of_kernels(x).isnan().all()


def test_table_is_what_its_script_makes() -> None:
    pytest.importorskip("mpmath")
    made = subprocess.run([sys.executable, COMMON / "gelu_table.py"], capture_output=True, text=True, check=True).stdout
    assert made == (COMMON / "gelu_table.h").read_text()
