"""The tests on the emulator must be able to fail.

Each fault here changes what the CUDA kernels are given, or what they wrote, as a bug in them would. The checks that the
conformance suite uses have to object, on cases that it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support_block import PARAMETERS, Block, check_block, eager_block
from support_cases import EPS, draws
from support_embed import DOWNSAMPLE, STEM, Embed, check_embed
from support_emulated import EMULATED as TARGET
from support_emulated import OPS
from support_faults import FEW_SEMANTICS, caught_by, first_caught, judge
from support_head import check_head
from support_moments import check_moments
from support_norm import check_norm

SLOT = 64


def without_last(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[-1] = 0
    return value


def changed(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """A fault: the kernels are given another value of a parameter."""

    def run(x, p):
        p = dict(p)
        for name, change in changes.items():
            p[name] = None if p[name] is None else change(p[name])
        return TARGET.block(x, p)

    return run


def given(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A fault: other moments than those of the tokens."""

    def run(x, p):
        found = TARGET.moments_for(x, p["per_position"])
        return OPS.block(x, None if found is None else change(found), *(p[name] for name in PARAMETERS))

    return run


def written(change: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable[..., Any]:
    """A fault: the tokens or their moments come out otherwise."""

    def run(x, p):
        out, found = TARGET.block(x, p)
        change(out, found)
        return out, found

    return run


def last_slot(value: float) -> Callable[..., Any]:
    return written(lambda out, _: out[-1].flatten(1)[:, -1 - (out[0, 0].numel() - 1) % SLOT :].fill_(value))


def moments_after(out: torch.Tensor, per_position: bool) -> torch.Tensor:
    return out.new_empty((len(out), 2, 0), dtype=torch.float32) if per_position else OPS.moments(out)


def tanh_gelu(x, p):
    """What the kernels wrote, and what the tanh form adds to it in float64."""
    out, _ = TARGET.block(x, p)
    exact, wide = F.gelu, {}
    for approximate in ("none", "tanh"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "gelu", partial(exact, approximate=approximate))
            wide[approximate] = eager_block(x.double(), p)
    out = out + (wide["tanh"] - wide["none"]).to(out.dtype)
    return out, moments_after(out, p["per_position"])


def unbiased(found: torch.Tensor, positions: int) -> torch.Tensor:
    """Moments whose variance over all is that of N C - 1."""
    count = positions * found.shape[2]
    scale = count / max(count - 1, 1)
    mean = found[:, :1].mean(2, keepdim=True)
    spread = torch.cat((mean + (found[:, :1] - mean) * scale**0.5, found[:, 1:] * scale), 1)
    return spread.contiguous()


def unbiased_variance(x, p):
    found = TARGET.moments_for(x, p["per_position"])
    found = None if found is None else unbiased(found, x.shape[2] * x.shape[3])
    return OPS.block(x, found, *(p[name] for name in PARAMETERS))


def plain_moments(x, p):
    """E[x^2] - E[x]^2."""
    if p["per_position"]:
        return TARGET.block(x, p)
    values = x.float().flatten(2)
    mean = values.mean(2)
    squares = values.square().mean(2) - mean.square()
    found = torch.stack((mean, squares * values.shape[2]), 1)
    return OPS.block(x, found, *(p[name] for name in PARAMETERS))


def other_norm(x, p):
    out, _ = OPS.block(x, OPS.moments(x), *(p[name] if name != "per_position" else not p[name] for name in PARAMETERS))
    return out, moments_after(out, p["per_position"])


BLOCK_FAULTS = {
    "tanh GELU": tanh_gelu,
    "eps dropped": changed(eps2=lambda eps: 0.0),
    "eps1 dropped": changed(eps1=lambda eps: 0.0),
    "eps 1e-6": changed(eps2=lambda eps: 1e-6),
    "unbiased variance": unbiased_variance,
    "E[x^2] - E[x]^2": plain_moments,
    "the other norm": other_norm,
    "fc1 bias dropped": changed(fc1_bias=torch.zeros_like),
    "fc1 bias of the last channel dropped": changed(fc1_bias=without_last),
    "fc2 bias dropped": changed(fc2_bias=torch.zeros_like),
    "last hidden channel dropped": changed(fc1_weight=without_last, fc1_bias=without_last),
    "last column of fc2 dropped": changed(fc2_weight=lambda w: without_last(w.transpose(0, 1)).transpose(0, 1)),
    "layer scale 1 dropped": changed(layer_scale_1=torch.ones_like),
    "layer scale 2 dropped": changed(layer_scale_2=torch.ones_like),
    "affine not folded": changed(affine_weight=lambda s: torch.full_like(s, 2.0)),
    "s instead of s - 1": changed(affine_weight=lambda s: s + 1),
    "affine shift dropped": changed(affine_bias=torch.zeros_like),
    "gamma2 dropped": changed(norm2_weight=torch.ones_like),
    "beta2 dropped": changed(norm2_bias=torch.zeros_like),
    "residual left out": changed(residual=lambda flag: False),
    "weights rounded to tf32": changed(fc1_weight=lambda w: (w.view(torch.int32) & -8192).view(w.dtype)),
    "weights rounded to bfloat16": changed(fc2_weight=lambda w: w.bfloat16().float()),
    "statistics of the first image": given(lambda m: m[:1].expand_as(m).contiguous()),
    "rstd rounded to bf16": given(lambda m: torch.cat((m[:, :1], m[:, 1:] * 1.003), 1)),
    "last slot unwritten": last_slot(float("nan")),
    "last slot zero": last_slot(0.0),
    "last row zero": written(lambda out, _: out[-1, :, -1, -1].fill_(0.0)),
    "moments of the input": written(lambda out, found: found.mul_(1.001)),
    "images swapped": written(lambda out, _: out.copy_(out.roll(1, 0)) if len(out) > 1 else out.zero_()),
}


def test_no_fault_passes(architecture):
    assert not caught_by(partial(check_block, TARGET.block), FEW_SEMANTICS)


@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_block(fault):
    judge(fault, first_caught(partial(check_block, BLOCK_FAULTS[fault]), FEW_SEMANTICS))


def embed_with(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda x, p, dtype: TARGET.embed(x, p | {name: change(p[name]) for name, change in changes.items()}, dtype)


def embed_written(change: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable[..., Any]:
    def run(x, p, dtype):
        out, found = TARGET.embed(x, p, dtype)
        change(out, found)
        return out, found

    return run


EMBED_FAULTS = {
    "": TARGET.embed,
    "bias dropped": embed_with(bias=torch.zeros_like),
    "taps transposed": embed_with(weight=lambda w: w.transpose(2, 3).contiguous()),
    "last tap dropped": embed_with(weight=lambda w: torch.cat((w[:, :, :, :-1], torch.zeros_like(w[..., :1])), 3)),
    "last input channel dropped": embed_with(weight=lambda w: torch.cat((w[:, :-1], torch.zeros_like(w[:, :1])), 1)),
    "last row unwritten": embed_written(lambda out, _: out[-1, :, -1].fill_(float("nan"))),
    "moments of other counts": embed_written(lambda _, found: found[:, 1].mul_(64 / 63)),
}
EMBEDS = (Embed(3, 16, **STEM, size=(33, 32)), Embed(16, 24, **DOWNSAMPLE, size=(17, 20), layout="channels_last"))


@pytest.mark.parametrize("fault", EMBED_FAULTS)
def test_embed(fault):
    found = caught_by(partial(check_embed, EMBED_FAULTS[fault]), EMBEDS)
    judge(fault, found)


def norm_with(change: Callable[[list], list]) -> Callable[..., Any]:
    def run(x, weight, bias, eps, per_position, dtype=None):
        found = TARGET.moments_for(x, per_position)
        return OPS.norm(*change([x, found, weight, bias, eps, per_position, dtype or x.dtype]))

    return run


def at(index: int, value: Callable[[Any], Any]) -> Callable[[list], list]:
    return lambda arguments: [value(a) if i == index else a for i, a in enumerate(arguments)]


NORM_FAULTS = {
    "": TARGET.norm,
    "eps dropped": norm_with(at(4, lambda eps: 0.0)),
    "weight dropped": norm_with(at(2, torch.ones_like)),
    "the other norm": norm_with(at(5, lambda flag: True)),
    "moments of the first image": norm_with(at(1, lambda m: m[:1].expand_as(m).contiguous())),
    "variance off": norm_with(at(1, lambda m: torch.cat((m[:, :1], m[:, 1:] * 1.003), 1))),
}


@pytest.mark.parametrize("fault", NORM_FAULTS)
def test_norm(fault):
    cases = [Block(values=values) for values in ("normal", "small", "mean1000")]
    found = first_caught(lambda case: check_norm(NORM_FAULTS[fault], case, fault), cases)
    judge(fault, found)


def head_with(change: Callable[[list], list]) -> Callable[..., Any]:
    def run(x, p, per_position, dtype=None):
        found = TARGET.moments_for(x, per_position)
        return OPS.head(*change([x, found, p[0], p[1], EPS, p[2], p[3], per_position, dtype or x.dtype]))

    return run


HEAD_FAULTS = {
    "": TARGET.head,
    "eps dropped": head_with(at(4, lambda eps: 0.0)),
    "fc bias dropped": head_with(at(6, torch.zeros_like)),
    "beta dropped": head_with(at(3, torch.zeros_like)),
    "last class zero": head_with(at(5, without_last)),
}


@pytest.mark.parametrize("fault", HEAD_FAULTS)
def test_head(fault):
    cases = [Block(values=values, batch=12) for values in ("normal", "small")]
    found = first_caught(lambda case: check_head(HEAD_FAULTS[fault], case, 500, fault), cases)
    judge(fault, found)


def test_moments_of_a_large_mean():
    x = draws(0, torch.float32)(2, 8, 17, 20, mean=1000.0)
    found = OPS.moments(x)
    assert not caught_by(lambda _: check_moments(found, x, ""), [0])
    values = x.flatten(2)
    found[:, 1] = values.shape[2] * (values.square().mean(2) - values.mean(2).square())
    assert caught_by(lambda _: check_moments(found, x, ""), [0])
