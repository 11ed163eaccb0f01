"""``verify=True`` must find broken kernels, leave healthy models alone, and leave no trace."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from riformer.model import RIFormer
from support_cases import DTYPES
from torch import nn

from riformer_kernels import VerificationError, backends, numerics, ops, patch, verification


@pytest.fixture
def broken(monkeypatch, backend):
    """``broken(block=..., ...)`` replaces ops of the backend; in-place blocks follow ``block``."""

    def install(**functions):
        plain = backends.ALL[backend]
        if "block" in functions:
            block = functions["block"]

            def block_(x, moments, *arguments):
                out, out_moments = block(x, moments, *arguments)
                x.copy_(out)
                if moments is not None:
                    moments.copy_(out_moments)

            functions["block_"] = block_
        monkeypatch.setitem(
            backends.ALL, backend, dataclasses.replace(plain, ops={**plain.ops, **functions}, prepare=None)
        )
        return plain

    return install


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("deploy", [False, True])
def test_healthy_models_pass(make, backend, dtype, norm, deploy):
    for seed in range(3):
        model = make(seed=seed, dtype=dtype, norm=norm, deploy=deploy, num_classes=2 + seed, out_indices=(0, 6))
        result = patch(model, backend=backend).verification[""]
        assert result.passed and [item.name for item in result.network] == ["norm0", "norm6", "head"]
        assert [item.name for item in result.branches] == [f"network.{i}.{j}" for i in (0, 2, 4, 6) for j in (0, 1)]
        assert result.dtype == str(dtype).removeprefix("torch.") and result.shape == (2, 3, 96, 96)
        assert all(item.ratios.ours.rms > 0 for item in result.branches), "something was measured"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_initialisation_passes(backend, dtype):
    torch.manual_seed(0)
    model = RIFormer("s12", num_classes=10).to(dtype).eval()
    assert patch(model, backend=backend).verification[""].passed


def test_compute_dtype_is_judged_in_that_dtype(make, backend):
    result = patch(make(num_classes=10), backend=backend, compute_dtype=torch.bfloat16).verification[""]
    assert result.dtype == "bfloat16" and result.passed
    assert result.branches[0].ratios.limits.rms == 1.25 and result.branches[0].ratios.ours.rms > 1e-4


def mutants(plain):
    """Broken blocks, as functions of the op's arguments. Positions as in the schema, moments second."""

    def changed(index, change):
        def block(*arguments):
            arguments = list(arguments)
            if arguments[index] is not None:
                arguments[index] = change(arguments[index])
            return plain.ops["block"](*arguments)

        return block

    def tanh(*arguments):
        gelu = ops.block.F.gelu
        ops.block.F.gelu = lambda x: gelu(x, approximate="tanh")
        try:
            return ops.block.reference(*arguments)
        finally:
            ops.block.F.gelu = gelu

    def tile_unwritten(*arguments):
        out, moments = plain.ops["block"](*arguments)
        out[:, :, :2, :2] = arguments[0][:, :, :2, :2]
        return out, moments

    def unbiased(x, moments, *rest):
        count = x.shape[1] * x.shape[2] * x.shape[3]
        if moments is not None:
            mean, centred = moments.unbind(1)
            centred = centred + (centred.sum(1, keepdim=True) / count) / x.shape[1] * 8
            moments = torch.stack((mean, centred), 1)
        return plain.ops["block"](x, moments, *rest)

    def last_hidden_dropped(*arguments):
        arguments = list(arguments)
        weight = arguments[13].clone()
        weight[:, -1] = 0
        arguments[13] = weight
        return plain.ops["block"](*arguments)

    def per_position(*arguments):
        *rest, _, residual, int8 = arguments
        out, _ = plain.ops["block"](*rest, True, residual, int8)
        return out, plain.ops["moments"](out)

    return {
        "gelu with tanh": tanh,
        "eps of the second norm dropped": changed(10, lambda eps: 0.0),
        "eps of the first norm dropped": changed(7, lambda eps: 0.0),
        "fc1 bias dropped": changed(12, lambda bias: None),
        "fc2 bias dropped": changed(14, lambda bias: None),
        "affine left out": lambda *arguments: plain.ops["block"](*arguments[:5], None, None, *arguments[7:]),
        "norm bias dropped": changed(9, torch.zeros_like),
        "last hidden channel dropped": last_hidden_dropped,
        "norm per position": per_position,
        "a tile unwritten": tile_unwritten,
        "variance off": unbiased,
    }


NAMES = list(mutants(backends.ALL["reference"]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "layer scale 1e-5"])
def test_broken_blocks_are_found_in_float32(make, backend, broken, name, hard):
    plain = backends.ALL[backend]
    # Tokens of unit variance hide an eps of 1e-5; one of 1e-3 shows.
    model = make(norm_eps=1e-3)
    if not hard:
        for block in (block for stage in model.network[::2] for block in stage):
            nn.init.constant_(block.layer_scale_1, 1e-5)
            nn.init.constant_(block.layer_scale_2, 1e-5)
    broken(block=mutants(plain)[name])
    with pytest.raises(VerificationError, match="branch"):
        patch(model, backend=backend)
    assert type(model) is RIFormer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fc1 bias dropped", "affine left out", "norm per position", "a tile unwritten"])
def test_gross_defects_are_found_in_every_dtype(make, backend, broken, name, dtype):
    plain = backends.ALL[backend]
    broken(block=mutants(plain)[name])
    with pytest.raises(VerificationError):
        patch(make(dtype=dtype), backend=backend)


def test_broken_stem_norm_and_head_are_found(make, backend, broken):
    plain = backends.ALL[backend]
    cases = {
        "embed": lambda x, w, b, *rest: plain.ops["embed"](x, w, None, *rest),
        "norm": lambda x, m, w, b, *rest: plain.ops["norm"](x, m, w, torch.zeros_like(b), *rest),
        "head": lambda x, m, w, b, eps, fw, fb, *rest: plain.ops["head"](x, m, w, b, eps, fw, None, *rest),
    }
    for name, function in cases.items():
        broken(**{name: function})
        model = make(num_classes=10)
        with pytest.raises(VerificationError, match=r"norm6|head"):
            patch(model, backend=backend)
        broken(**{name: plain.ops[name]})
        assert patch(model, backend=backend).verification[""].passed


def test_wrong_moments_between_blocks_are_found(make, backend, broken):
    plain = backends.ALL[backend]

    def stale(*arguments):
        out, moments = plain.ops["block"](*arguments)
        return out, arguments[1] if arguments[1] is not None else moments

    broken(block=stale)
    with pytest.raises(VerificationError, match="norm6"):
        patch(make(), backend=backend)


def test_no_trace(make, backend):
    model = make(num_classes=10, drop_path_rate=0.1)
    model.network[2].train()
    seen = []
    model.network[0][0].mlp.register_forward_hook(lambda *a: seen.append("inner"))
    model.register_forward_hook(lambda *a: seen.append("outer"))
    model.network[4][0].norm2 = nn.BatchNorm2d(48).train()
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    versions = [(id(value), value._version) for value in (*model.parameters(), *model.buffers())]
    rng = torch.get_rng_state()
    handle = patch(model, backend=backend, strict=False)
    assert torch.equal(torch.get_rng_state(), rng) and seen == []
    assert [module.training for module in model.modules()] == flags
    assert [(id(value), value._version) for value in (*model.parameters(), *model.buffers())] == versions
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert len(handle.verification[""].branches) < 8


def test_active_dropout_is_noted(make, backend):
    model = make(drop_path_rate=0.5).train()
    result = patch(model, backend=backend, strict=False).verification[""]
    assert result.network == () and "dropout is active in 7" in result.note and len(result.branches) == 1


def test_larger_strides_get_a_larger_image(make, backend):
    model = make()
    model.patch_embed.proj.stride = (16, 16)
    assert patch(model, backend=backend).verification[""].shape == (2, 3, 384, 384)


def test_repetition_on_chance(make, backend, monkeypatch):
    """What exceeds a limit on one batch is repeated on five more. It fails if they exceed together and mostly alone."""
    seeds = []
    plain = verification._seeded
    monkeypatch.setattr(
        verification, "_seeded", lambda shape, seed, *rest: seeds.append(seed) or plain(shape, seed, *rest)
    )
    patch(make(), backend=backend)
    assert set(seeds) == {0}
    x = torch.ones(1, 4, 2, 2)

    def judged(bad_batches):
        sample = lambda seed: [(x + (3e-3 if seed in bad_batches else 1e-3), x + 1e-3, x.double())]  # noqa: E731
        (found,) = verification._judge(["x"], sample, [numerics.limits_for(torch.float32)])
        return found.batches, found.exceeding, found.passed

    assert judged(()) == (1, 0, True)
    assert judged((0, 3)) == (6, 2, True)
    assert judged((0, 3, 4)) == (6, 3, True)
    assert judged((0, 3, 4, 5)) == (6, 4, False)


def test_figures_as_data(make, backend):
    result = patch(make(num_classes=10), backend=backend).verification[""]
    data = result.as_dict()
    assert data["passed"] is True and data["network"][0]["name"] == "norm6"
    assert result.network[0].as_dict()["rms"] == result.network[0].ratios.rms
    assert len(result.lines()) == 3 and "branch, worst of 8" in result.lines()[-1]
