"""The tests in the interpreter must be able to fail.

Each fault here is put into Triton's kernels or their launches. The checks that the conformance suite uses have to
object, on cases that it uses.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from support_block import Block, block_parameters, check_block
from support_cases import draws, tokens
from support_embed import DOWNSAMPLE, STEM, Embed, check_embed
from support_faults import FEW_SEMANTICS, caught_by, first_caught, judge
from support_head import check_head
from support_interpreted import INTERPRETED, Guarded
from support_moments import check_moments
from support_norm import check_norm

from riformer_kernels.backends.triton import _math, block, block_maps, choice, embed, head, moments, norm

MODULES = (block, block_maps, embed, head, moments, norm)


@triton.jit
def gelu_of_tanh(x, EXACT: tl.constexpr):
    t = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (3.0 - 2.0 / (1.0 + tl.exp(2.0 * t)) - 1.0)


@triton.jit
def gelu_without_clamp(x, EXACT: tl.constexpr):
    return tl.maximum(x, 0.0)


@triton.jit
def unbiased(mean, centred, first, positions, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    d = tl.where(tl.arange(0, BLOCK_C) < C, mean - tl.sum(mean, 0) / C, 0.0)
    total = tl.sum(centred, 0) + positions * tl.sum(d * d, 0)
    mu = tl.sum(mean, 0) / C
    return mu, 0.0, 1.0 / tl.sqrt(total / (positions * C - 1.0) + eps), d


@triton.jit
def rounded(mean, centred, first, positions, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    mu, low, rstd, d = _math.centred_statistics(mean, centred, first, positions, eps, C, BLOCK_C)
    return mu, low, rstd.to(tl.bfloat16).to(tl.float32), d


@triton.jit
def plain_sums(partials, values, inside, count, channel, C: tl.constexpr):
    """E[x^2] - E[x]^2."""
    held = tl.where(inside, values, 0.0)
    mean = tl.sum(held, 0) / count
    tl.store(partials + channel, mean, channel < C)
    tl.store(partials + C + channel, tl.sum(held * held, 0) - count * mean * mean, channel < C)


@triton.jit
def padded_rows_counted(partials, values, inside, count, channel, C: tl.constexpr):
    _math.store_tile_moments(partials, values, inside, count + 1.0, channel, C)


def argument(kernel, name, change):
    """A fault: argument ``name`` of each launch of ``kernel`` is ``change(value)``."""

    def patched(monkeypatch):
        for module in MODULES:
            original = module.launch

            def launch(function, programs, device, *arguments, original=original, **settings):
                if function.__name__ == kernel:
                    if name == "programs":
                        programs = change(programs)
                    elif name in settings:
                        settings[name] = change(settings[name])
                    else:
                        at = function.arg_names.index(name)
                        arguments = (*arguments[:at], change(arguments[at]), *arguments[at + 1 :])
                original(function, programs, device, *arguments, **settings)

            monkeypatch.setattr(module, "launch", launch)

    return patched


def replaced(name, function, *modules):
    """A fault: another device function of this name in ``modules``."""
    return lambda monkeypatch: [monkeypatch.setattr(module, name, function) for module in modules]


def none(value):
    return None


def rounded_to_tf32(value):
    return (value.view(torch.int32) & -8192).view(value.dtype)


def without_last(value):
    value = value.clone()
    value[-1] = 0
    return value


BLOCK_FAULTS = {
    "tanh GELU": replaced("gelu", gelu_of_tanh, block),
    "ReLU": replaced("gelu", gelu_without_clamp, block),
    "eps dropped": argument("_prepare_kernel", "eps2", lambda eps: 0.0),
    "eps1 dropped": argument("_prepare_kernel", "eps1", lambda eps: 0.0),
    "eps 1e-6": argument("_prepare_kernel", "eps2", lambda eps: 1e-6),
    "eps dropped with LayerNorm": argument("_position_kernel", "eps2", lambda eps: 0.0),
    "unbiased variance": replaced("centred_statistics", unbiased, block_maps),
    "rstd rounded to bf16": replaced("centred_statistics", rounded, block_maps),
    "E[x^2] - E[x]^2": replaced("store_tile_moments", plain_sums, block, moments),
    "a padded row counted": replaced("store_tile_moments", padded_rows_counted, block),
    "fc1 bias dropped": argument("_fused_kernel", "fc1_bias", none),
    "fc1 bias of the last channel dropped": argument("_fused_kernel", "fc1_bias", without_last),
    "fc2 bias dropped": argument("_fused_kernel", "fc2_bias", none),
    "layer scale 2 dropped": argument("_fused_kernel", "layer_scale_2", none),
    "last hidden channel dropped": argument("_fused_kernel", "fc1_weight", without_last),
    "affine not folded": argument("_prepare_kernel", "affine_weight", none),
    "affine shift dropped": argument("_prepare_kernel", "affine_bias", none),
    "layer scale 1 dropped": argument("_prepare_kernel", "layer_scale_1", torch.ones_like),
    "beta2 dropped": argument("_prepare_kernel", "norm2_bias", torch.zeros_like),
    "gamma2 dropped": argument("_prepare_kernel", "norm2_weight", torch.ones_like),
    "residual left out": argument("_fused_kernel", "RESIDUAL", lambda residual: False),
    "tile unwritten": argument("_fused_kernel", "programs", lambda count: count - 1),
    "last row of each image": argument("_fused_kernel", "positions", lambda count: count - 1),
    "moments of other counts": argument("_merge_kernel", "ROWS", lambda rows: rows - 1),
    "statistics of the first image": argument("_prepare_kernel", "moments", lambda m: m[:1].expand_as(m).contiguous()),
    "maps of the first image": argument("_fused_kernel", "maps", lambda m: m[:1].expand_as(m).contiguous()),
    "weights rounded to tf32": argument("_fused_kernel", "fc1_weight", rounded_to_tf32),
}  # fmt: skip
WIDE_FAULTS = {
    "fc1 bias dropped": argument("_expand_kernel", "fc1_bias", none),
    "last hidden column unwritten": argument("_expand_kernel", "programs", lambda count: count - 1),
    "hidden of other rows": argument("_project_kernel", "hidden", lambda h: h.roll(1, 1)),
    "fc2 bias dropped": argument("_project_kernel", "fc2_bias", none),
    "residual left out": argument("_project_kernel", "RESIDUAL", lambda residual: False),
}
WIDE = [Block(24, (13, 5), residual=residual, seed=3) for residual in (True, False)]


def test_no_fault_passes():
    assert not caught_by(partial(check_block, INTERPRETED.block), FEW_SEMANTICS)


# A tile that is not written is NaN rather than what happened to be there.
def guarded_block(x, parameters):
    with Guarded():
        return INTERPRETED.block(x, parameters)


@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_block(monkeypatch, fault):
    BLOCK_FAULTS[fault](monkeypatch)
    judge(fault, first_caught(partial(check_block, guarded_block), FEW_SEMANTICS))


@pytest.mark.parametrize("fault", ["", *WIDE_FAULTS])
def test_wide_block(monkeypatch, force, fault):
    force(choice.BlockChoice(None, *[choice.MatrixTile(16, 32, 16, 4, 2)] * 2))
    if fault:
        WIDE_FAULTS[fault](monkeypatch)
    found = first_caught(partial(check_block, guarded_block), WIDE)
    judge(fault, found)


EMBED_FAULTS = {
    "bias dropped": argument("_conv_kernel", "bias", none),
    "padding shifted": argument("_conv_kernel", "PADDING", lambda padding: padding - 1),
    "one row less": argument("_conv_kernel", "height", lambda height: height - 1),
    "one column more": argument("_conv_kernel", "width", lambda width: width + 1),
    "weight as it lies": argument("_reorder_kernel", "TAPS", lambda taps: 1),
    "taps transposed": argument("_conv_kernel", "weight", lambda w: w.flip(-1)),
    "tile unwritten": argument("_conv_kernel", "programs", lambda count: count - 1),
    "moments of other counts": argument("_merge_kernel", "ROWS", lambda rows: rows - 1),
}
EMBEDS = (Embed(3, 16, **STEM, size=(33, 32)), Embed(16, 24, **DOWNSAMPLE, size=(17, 20), layout="channels_last"))


@pytest.mark.parametrize("fault", ["", *EMBED_FAULTS])
def test_embed(monkeypatch, fault):
    if fault:
        EMBED_FAULTS[fault](monkeypatch)

    def run(x, parameters, dtype):
        with Guarded():
            return INTERPRETED.embed(x, parameters, dtype)

    found = caught_by(partial(check_embed, run), EMBEDS)
    judge(fault, found)


NORM_FAULTS = {
    "eps dropped": argument("_norm_kernel", "eps", lambda eps: 0.0),
    "unbiased variance": replaced("centred_statistics", unbiased, norm),
    "rstd rounded to bf16": replaced("centred_statistics", rounded, norm),
    "E[x^2] - E[x]^2": replaced("store_tile_moments", plain_sums, moments),
    "the other norm": argument("_norm_kernel", "PER_POSITION", lambda flag: True),
    "moments of the first image": argument("_norm_kernel", "moments", lambda m: m[:1].expand_as(m).contiguous()),
}


@pytest.mark.parametrize("fault", ["", *NORM_FAULTS])
def test_norm(monkeypatch, fault):
    if fault:
        NORM_FAULTS[fault](monkeypatch)
    cases = [Block(values=values) for values in ("normal", "small", "mean1000")]
    found = first_caught(lambda case: check_norm(INTERPRETED.norm, case, fault), cases)
    judge(fault, found)


HEAD_FAULTS = {
    "eps dropped": argument("_head_kernel", "eps", lambda eps: 0.0),
    "unbiased variance": replaced("centred_statistics", unbiased, head),
    "fc bias dropped": argument("_head_kernel", "fc_bias", none),
    "last classes unwritten": argument("_head_kernel", "programs", lambda count: count - 1),
    "beta dropped": argument("_head_kernel", "bias", torch.zeros_like),
}


@pytest.mark.parametrize("fault", ["", *HEAD_FAULTS])
def test_head(monkeypatch, fault):
    if fault:
        HEAD_FAULTS[fault](monkeypatch)

    def run(*arguments):
        with Guarded():
            return INTERPRETED.head(*arguments)

    cases = [Block(values=values, batch=12) for values in ("normal", "small")]
    found = first_caught(lambda case: check_head(run, case, 500, fault), cases)
    judge(fault, found)


def test_moments_of_a_large_mean(monkeypatch):
    x = draws(0, torch.float32)(2, 8, 17, 20, mean=1000.0)
    assert not caught_by(lambda _: check_moments(moments.moments(x), x, ""), [0])
    monkeypatch.setattr(moments, "store_tile_moments", plain_sums)
    assert caught_by(lambda _: check_moments(moments.moments(x), x, ""), [0])


def test_guard_regions_see_a_row_too_many(monkeypatch):
    argument("_fused_kernel", "positions", lambda count: count + 1)(monkeypatch)
    case = Block(16, (9, 7), layout="channels_last", batch=1)
    with Guarded() as mode:
        INTERPRETED.block(tokens(case, 0, 16), block_parameters(case, 0))
    with pytest.raises(AssertionError, match="written outside"):
        mode.check()
