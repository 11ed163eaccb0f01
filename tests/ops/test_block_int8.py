"""Blocks whose products are int8, on the CPU: against their statement, on every instruction set, and bad weights."""

from __future__ import annotations

import pytest
import torch
from support_block import PARAMETERS, Block, block_parameters, eager_block
from support_cases import tokens
from support_cpu import CPU, ISAS, OPS, per_isa, selected
from support_int8 import CLOSE, check_int8, distances, stated

from riformer_kernels import algebra, quantise
from riformer_kernels.ops import block

CASES = (
    Block(64, (7, 7), int8=True, residual=False),
    Block(64, (7, 9), norm="ln", int8=True, residual=False),
    Block(16, (5, 5), int8=True, form="deployed"),
    Block(24, (17, 20), batch=1, hidden=264, int8=True, residual=False),  # a last chunk of 8
    Block(8, (3, 3), batch=20, int8=True, form="unit", residual=False),  # more images than a vector has lanes
    Block(24, (1, 1), batch=20, int8=True, residual=False, hidden=520),
    Block(320, (14, 14), batch=1, hidden=520, int8=True, residual=False),
    Block(40, (17, 17), norm="ln", form="unit", int8=True, layout="channels_last"),
    Block(64, (9, 7), int8=True, residual=False, absent=("fc1_bias", "fc2_bias", "layer_scale_2", "affine_bias")),
    Block(64, (9, 7), int8=True, residual=False, parameters=torch.bfloat16),
    Block(64, (9, 7), int8=True, residual=False, values="mean1000", form="unit"),
)


@per_isa
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_compute_the_statement(isa, case):
    check_int8(CPU.block, case, isa)


def plain(x, parameters):
    values = [v.float() if isinstance(v, torch.Tensor) else v for v in (parameters[name] for name in PARAMETERS)]
    return block.reference(x, None if parameters["per_position"] else algebra.moments_of(x), *values)


def no_mean_of_gelu(mean, deviation):
    return torch.zeros_like(mean)


def plain_mean_of_gelu(mean, deviation):
    return torch.nn.functional.gelu(mean)


def scale_per_tensor(weight, name):
    return quantise._rounded(weight, weight.abs().max() / 127, 0.0)


def scale_of_seven_bits(weight, name):
    return quantise._rounded(weight, weight.abs().amax(dim=1, keepdim=True) / 63, 0.0)


def symmetric_bytes(z):
    return quantise._rounded(z, z.abs().amax(dim=1, keepdim=True) / 127, 0.0)


FAULTS = {
    "correction of W2 left out": ("mean_of_gelu", no_mean_of_gelu),
    "spread left out": ("mean_of_gelu", plain_mean_of_gelu),
    "scale per tensor": ("rounded", scale_per_tensor),
    "weights of seven bits": ("rounded", scale_of_seven_bits),
    "z in symmetric bytes": ("_bytes", symmetric_bytes),
    "shift of another size": ("SHIFT", 0.18),
    "other chunks": ("CHUNK", 128),
    "z in float": ("_bytes", lambda z: z),
    "weights in float": ("rounded", lambda weight, name: weight),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, monkeypatch):
    """The check that the kernels pass must object to a statement with a fault."""
    name, faulty = FAULTS[fault]

    def run(x, parameters):
        with monkeypatch.context() as changed:
            changed.setattr(quantise, name, faulty)
            return plain(x, parameters)

    found = [distances(run, case) for case in CASES if case.norm == "gn" and case.channels <= 64]
    assert any(each[kind] > CLOSE[kind] for each in found for kind in each), found


def test_without_a_fault_the_statement_passes():
    for case in CASES:
        check_int8(plain, case)


EXTREME = Block(128, (7, 7), int8=True, form="unit", residual=False)


def extreme():
    """Weights and tokens whose products of bytes are as large as they can be, where 16 bits would saturate."""
    x, parameters = tokens(EXTREME, 0, 128), block_parameters(EXTREME, 0)
    x[:, ::2] = x[:, ::2].abs() * 0.01 + 3
    signs = parameters["fc1_weight"].sign()
    signs[:64] = signs[:64].abs()
    return x, parameters | {"fc1_weight": signs * 0.1, "fc2_weight": parameters["fc2_weight"].sign() * 0.1}


@pytest.mark.parametrize("pair", [("avx512_vnni", "avx512"), ("avx2_vnni", "avx2"), ("avx512_vnni", "avx512_bf16")])
def test_sums_of_bytes_are_exact_with_and_without_vnni(pair):
    """Sets with the same vectors differ in these instructions alone, so that their results agree to the bit."""
    if not set(pair) <= set(ISAS):
        pytest.skip(f"this machine has not both of {pair}")
    for x, parameters in (extreme(), *((tokens(case, 0, case.channels), block_parameters(case, 0)) for case in CASES)):
        found = []
        for isa in pair:
            with selected(isa):
                found.append(CPU.block(x, parameters)[0])
        assert torch.equal(*found)


@per_isa
def test_extreme_bytes(isa):
    x, parameters = extreme()
    statement, golden = stated(x, parameters), eager_block(x.double(), parameters)
    error = (CPU.block(x, parameters)[0] - statement).double().square().mean().sqrt()
    assert error <= CLOSE["values"] * (statement - golden).square().mean().sqrt()


@per_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["fc1_weight", "fc2_weight"])
def test_weights_that_are_not_finite_are_refused(isa, name, value):
    case = Block(16, (5, 5), int8=True, hidden=40)
    x, parameters = tokens(case, 0, 16), block_parameters(case, 0)
    weight = parameters[name].clone()
    weight[11, 3] = value
    before = x.clone()
    with pytest.raises(RuntimeError, match=rf"{name} has a value in row 11 that is not finite.*compute_dtype"):
        OPS.block_(x, OPS.moments(x), *(({**parameters, name: weight})[key] for key in PARAMETERS))
    assert torch.equal(x, before)
    with pytest.raises(RuntimeError, match=f"{name} has values that are not finite"):
        plain(x, {**parameters, name: weight})


@per_isa
@pytest.mark.parametrize("name", ["fc1_bias", "norm2_bias", "norm2_weight"])
def test_nan_in_other_parameters_is_passed_on(isa, name):
    case = Block(16, (5, 5), int8=True, hidden=40)
    x, parameters = tokens(case, 0, 16), block_parameters(case, 0)
    parameters[name] = parameters[name].clone()
    parameters[name][3] = float("nan")
    out, moments = CPU.block(x, parameters)
    assert out.isnan().all() and moments.isnan().all()


@per_isa
def test_tokens_without_spread_and_weights_of_zero(isa):
    """Ranges of zero have no scale; what is rounded then is zero."""
    case = Block(16, (5, 5), int8=True, hidden=40, form="unit")
    parameters = block_parameters(case, 0)
    parameters |= {"fc1_weight": parameters["fc1_weight"] * 0, "fc2_weight": parameters["fc2_weight"].clone()}
    parameters["fc2_weight"][5] = 0
    x = torch.ones(2, 16, 5, 5)
    out, _ = CPU.block(x, parameters)
    assert torch.allclose(out.double(), eager_block(x.double(), parameters), atol=2e-2)
    assert torch.allclose(out[:, 5].double(), eager_block(x.double(), parameters)[:, 5], atol=1e-6)


@per_isa
def test_tiny_and_large_values(isa):
    """Scales below float32's normal numbers and weights near its end."""
    case = Block(16, (5, 5), int8=True, hidden=40, form="unit", residual=False)
    x, parameters = tokens(case, 0, 16), block_parameters(case, 0)
    for name, factor in (("fc1_weight", 1e-39), ("fc2_weight", 1e-39), ("norm2_weight", 1e-35), ("fc2_weight", 1e36)):
        changed = {**parameters, name: parameters[name] * factor}
        golden = eager_block(x.double(), changed)
        out, _ = CPU.block(x, changed)
        assert ((out - golden).abs() <= 0.1 * golden.abs().max()).all(), (name, factor)


def test_too_many_channels_for_exact_sums_are_refused():
    x = torch.zeros(1, 66320, 1, 1)
    case = Block(66320, (1, 1), hidden=8, int8=True, form="unit")
    with pytest.raises(RuntimeError, match="66320 channels, expected at most 66311"):
        CPU.block(x, block_parameters(case, 0))


def test_gradients_are_those_without_the_rounding():
    case = Block(16, (5, 5), int8=True, hidden=40)
    x, parameters = tokens(case, 0, 16), block_parameters(case, 0)

    def gradients(int8):
        leaves = {
            key: value.clone().requires_grad_() if isinstance(value, torch.Tensor) else value
            for key, value in (parameters | {"int8": int8}).items()
        }
        out, _ = OPS.block(x, OPS.moments(x), *(leaves[name] for name in PARAMETERS))
        out.square().sum().backward()
        return [value.grad for value in leaves.values() if isinstance(value, torch.Tensor)]

    for mine, theirs in zip(gradients(True), gradients(False), strict=True):
        # The results that are squared differ by the rounding.
        assert torch.allclose(mine, theirs, rtol=0, atol=0.03 * theirs.abs().max().item())
