"""The suite must be able to fail.

Every fault here is put into a plain-PyTorch form of an op. The checks that the tests of the kernels use, on cases that
they use, have to object. A fault that gets through is a hole in the tests, not in the kernels.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support_block import SEMANTICS, Block, block_parameters, check_block
from support_cases import draws, tokens
from support_embed import Embed, check_embed
from support_equivalence import check_model
from support_faults import caught_by, judge
from support_head import check_head
from support_moments import check_moments
from support_norm import check_norm

from riformer_kernels import algebra, ops

BLOCK_FAULTS = (
    "tanh GELU", "eps dropped", "eps 1e-6", "unbiased variance", "fc1 bias dropped", "fc1 bias of one channel dropped",
    "fc2 bias dropped", "the other norm", "last hidden channel dropped", "tile zero", "tile unwritten",
    "rstd rounded to bf16", "E[x^2] - E[x]^2", "affine not folded", "s instead of s - 1", "affine shift dropped",
    "layer scale 1 dropped", "layer scale 2 dropped", "residual from x", "norm2 of x", "hidden rounded to bf16",
    "gamma2 dropped", "beta2 dropped", "moments of the input", "statistics of the first image", "identity",
)  # fmt: skip


def norm_with(fault, v, weight, bias, eps, per_position):
    dims = (1,) if per_position != (fault == "the other norm") else (1, 2, 3)
    eps = {"eps dropped": 0.0, "eps 1e-6": 1e-6}.get(fault, eps)
    mean = v.mean(dims, keepdim=True)
    variance = (v - mean).square().mean(dims, keepdim=True)
    count = v[0].numel() // variance[0].numel()
    if fault == "E[x^2] - E[x]^2":
        variance = v.square().mean(dims, keepdim=True) - mean.square()
    if fault == "unbiased variance":
        variance = variance * count / max(count - 1, 1)
    if fault == "statistics of the first image":
        mean, variance = mean[:1], variance[:1]
    rstd = (variance + eps).rsqrt()
    if fault == "rstd rounded to bf16":
        rstd = rstd.bfloat16().to(v)
    return (v - mean) * rstd * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


def block_with(fault, x, parameters):
    """``block`` in plain PyTorch with one fault ("" for none), float32 inside as the kernels are."""
    p = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in parameters.items()}

    def column(name):
        return p[name].view(-1, 1, 1)

    y = x = x.float()
    if p["norm1_weight"] is not None:
        scale, shift = p["affine_weight"], p["affine_bias"]
        if fault == "affine not folded":
            scale = shift = None
        if fault == "s instead of s - 1" and scale is not None:
            scale = scale + 1
        if fault == "affine shift dropped":
            shift = None
        weight, bias = algebra.fold_affine(p["norm1_weight"], p["norm1_bias"], scale, shift)
        mixed = norm_with(fault, x, weight, bias, p["eps1"], p["per_position"])
        y = x + (mixed if fault == "layer scale 1 dropped" else column("layer_scale_1") * mixed)
    gamma, beta = p["norm2_weight"], p["norm2_bias"]
    gamma = torch.ones_like(gamma) if fault == "gamma2 dropped" else gamma
    beta = torch.zeros_like(beta) if fault == "beta2 dropped" else beta
    z = norm_with(fault, x if fault == "norm2 of x" else y, gamma, beta, p["eps2"], p["per_position"])
    w1, b1 = p["fc1_weight"].clone(), p["fc1_bias"].clone()
    if fault == "last hidden channel dropped":
        w1[-1], b1[-1] = 0, 0
    if fault == "fc1 bias dropped":
        b1.zero_()
    if fault == "fc1 bias of one channel dropped":
        b1[b1.numel() // 2] = 0
    hidden = F.gelu(F.conv2d(z, w1, b1), approximate="tanh" if fault == "tanh GELU" else "none")
    if fault == "hidden rounded to bf16":
        hidden = hidden.bfloat16().float()
    branch = F.conv2d(hidden, p["fc2_weight"], None if fault == "fc2 bias dropped" else p["fc2_bias"])
    branch = branch if fault == "layer scale 2 dropped" else column("layer_scale_2") * branch
    out = ((x if fault == "residual from x" else y) + branch) if p["residual"] else branch
    if fault == "identity":
        out = x.clone()
    if fault.startswith("tile"):
        last = slice(-16, None)
        out.flatten(2)[-1, :, last] = 0 if fault == "tile zero" else x.flatten(2)[-1, :, last]
    moments = algebra.moments_of(x if fault == "moments of the input" else out)
    if fault == "E[x^2] - E[x]^2":
        values = out.flatten(2)
        mean = values.mean(2)
        moments = torch.stack((mean, values.square().sum(2) - values.shape[2] * mean.square()), 1)
    return out, moments[:, :, :0] if p["per_position"] else moments


def test_no_fault_passes():
    assert not caught_by(partial(check_block, partial(block_with, "")), SEMANTICS)


@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_block(fault):
    found = caught_by(partial(check_block, partial(block_with, fault)), SEMANTICS)
    judge(fault, found)


@pytest.mark.parametrize("fault", ["eps dropped", "tanh GELU", "rstd rounded to bf16", "unbiased variance"])
def test_what_no_bfloat16_row_can_see_is_seen_by_float32(fault):
    """Why the float32 rows are there: these are caught by them at ordinary values, not only at special ones."""
    ordinary = [case for case in SEMANTICS if case.values == "normal" and case.size != (1, 1)]
    assert caught_by(partial(check_block, partial(block_with, fault)), ordinary), fault


# ----------------------------------------------------------------------------------------------------- the other ops

EMBEDS = (
    Embed(3, 16, (7, 7), 4, 2, size=(33, 32)),
    Embed(16, 24, size=(17, 20)),
    Embed(8, 24, size=(9, 7), weight_layout="channels_last"),
)
EMBED_FAULTS = (
    "bias dropped", "last tap dropped", "last input channel dropped", "taps transposed", "padding shifted",
    "padding with the edge", "tile zero", "images rounded to bf16", "moments of half of it",
    "bias of one channel dropped",
)  # fmt: skip


def embed_with(fault, x, p, dtype):
    weight, bias = p["weight"].clone(), p["bias"].clone()
    if fault == "bias dropped":
        bias.zero_()
    if fault == "bias of one channel dropped":
        bias[-1] = 0
    if fault == "last tap dropped":
        weight[:, :, -1, -1] = 0
    if fault == "last input channel dropped":
        weight[:, -1] = 0
    if fault == "taps transposed":
        weight = weight.transpose(2, 3)
    if fault == "images rounded to bf16":
        x = x.bfloat16().float()
    pad = (p["padding"],) * 4
    if fault == "padding shifted":
        pad = (pad[0] - 1, pad[0] + 1, pad[0], pad[0])
    x = F.pad(x, pad, mode="replicate" if fault == "padding with the edge" else "constant")
    out = F.conv2d(x, weight, bias, p["stride"]).to(dtype).contiguous()
    if fault == "tile zero":
        out.flatten(2)[-1, :, -16:] = 0
    half = out[:, :, : max(1, out.shape[2] // 2)] if fault == "moments of half of it" else out
    return out, algebra.moments_of(half.float())


@pytest.mark.parametrize("fault", ["", *EMBED_FAULTS])
def test_embed(fault):
    found = caught_by(partial(check_embed, partial(embed_with, fault)), EMBEDS)
    judge(fault, found)


NORM_FAULTS = ("eps dropped", "eps 1e-6", "unbiased variance", "the other norm", "rstd rounded to bf16",
               "E[x^2] - E[x]^2", "statistics of the first image")  # fmt: skip
NORMS = [Block(norm=n, values=v) for n in ("gn", "ln") for v in ("normal", "small", "mean1000")]
POOLED = [Block(norm=n, values=v, batch=12) for n in ("gn", "ln") for v in ("normal", "small", "mean1000")]


@pytest.mark.parametrize("fault", ["", *NORM_FAULTS])
def test_norm(fault):
    def run(x, weight, bias, eps, per_position, dtype=None):
        # In float64, as three float32 roundings in a row are more than eager has; sums of squares lose nothing there.
        v = x if fault == "E[x^2] - E[x]^2" else x.double()
        return norm_with(fault, v, weight.to(v), bias.to(v), eps, per_position).to(x.dtype)

    found = caught_by(lambda case: check_norm(run, case, fault), NORMS)
    judge(fault, found)


HEAD_FAULTS = (*NORM_FAULTS, "fc bias dropped", "maximum pooled", "norm after the pooling")


@pytest.mark.parametrize("fault", ["", *HEAD_FAULTS])
def test_head(fault):
    def run(x, p, per_position, dtype=None):
        normed = norm_with(fault, x, p[0], p[1], 1e-5, per_position)
        pooled = normed.amax((2, 3)) if fault == "maximum pooled" else normed.mean((2, 3))
        if fault == "norm after the pooling":
            pooled = norm_with("", x.mean((2, 3), keepdim=True), p[0], p[1], 1e-5, per_position).flatten(1)
        return F.linear(pooled, p[2], None if fault == "fc bias dropped" else p[3])

    # One norm per case: pooling and norm swap where the norm's statistics are those of the whole image. Mean 1000 is
    # left to `test_norm`: a plain float32 mean is not the reference there.
    cases = [case for case in POOLED if case.values != "mean1000" or fault == "E[x^2] - E[x]^2"]
    found = caught_by(lambda case: check_head(run, case, 40, fault), cases)
    judge(fault, found)


MOMENTS_FAULTS = ("E[x^2] - E[x]^2", "unbiased", "sum for mean", "one channel")


@pytest.mark.parametrize("fault", ["", *MOMENTS_FAULTS])
def test_moments(fault):
    x = draws(0, torch.float32)(2, 8, 17, 20, mean=1000.0)
    mean = x.mean((2, 3))
    centred = (x - mean[:, :, None, None]).square().sum((2, 3))
    if fault == "E[x^2] - E[x]^2":
        centred = x.square().sum((2, 3)) - 340 * mean.square()
    if fault == "unbiased":
        centred = centred * 340 / 339
    if fault == "sum for mean":
        mean = mean * 340
    if fault == "one channel":
        mean = mean[:, :1].expand(-1, 8)
    found = caught_by(lambda _: check_moments(torch.stack((mean, centred), 1), x, fault), [0])
    judge(fault, found)


FAULTS = {
    "moments": MOMENTS_FAULTS, "embed": EMBED_FAULTS, "block": BLOCK_FAULTS, "block_": BLOCK_FAULTS,
    "norm": NORM_FAULTS, "head": HEAD_FAULTS,
}  # fmt: skip


@pytest.mark.parametrize("op", ops.ALL)
def test_every_op_has_faults(op):
    """A new op fails here until this file puts faults into it. ``block_`` goes through the check of ``block``."""
    assert FAULTS.get(op), f"no fault of op {op!r} is tested"


# -------------------------------------------------------------------------------------------------- the whole model


def identity_block(model, images):
    model.network[4][1] = torch.nn.Identity()
    return model(images)


def one_fc1_bias(model, images):
    model.network[2][0].mlp.fc1.bias.data[3] = 0
    return model(images)


def other_eps(model, images):
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-3
    return model(images)


@pytest.mark.parametrize("fault", [identity_block, one_fc1_bias, other_eps], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("arch", "size", "classes"), [("s12", (64, 64), 0), ("s12", (64, 64), 1000)])
def test_model(fault, arch, size, classes):
    deploy = False
    with pytest.raises(AssertionError, match="limit"):
        check_model(fault, arch, deploy, torch.float32, "nchw", size, fault.__name__, classes)


def test_model_without_fault_passes():
    check_model(lambda model, images: model(images), "s12", False, torch.float32, "nchw", (64, 64), "control")


def test_a_layer_scale_of_1e_5_hides_what_is_broken():
    """Why every parameter is drawn hard: with a fresh model's layer scale the block is the identity, in bfloat16."""
    case = Block(dtype=torch.bfloat16)
    x, parameters = tokens(case, 0, 16), block_parameters(case, 0)
    fresh = torch.full((16,), 1e-5, dtype=torch.bfloat16)
    parameters |= {"layer_scale_1": fresh, "layer_scale_2": fresh}
    out, _ = block_with("", x, parameters)
    assert (out.bfloat16() == x).float().mean() > 0.9
    assert (block_with("", x, block_parameters(case, 0))[0].bfloat16() == x).float().mean() < 0.1
