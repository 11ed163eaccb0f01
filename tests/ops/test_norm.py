"""``norm``: the norm of a feature map at ``out_indices``, on every instruction set of this machine."""

from __future__ import annotations

import itertools

import pytest
import torch
from support_block import Block
from support_cases import DTYPES, EPS, LAYOUTS, check_ratios, draws, lay_out, per_dtype, per_norm, tokens
from support_cpu import CPU, OPS, per_isa
from support_norm import check_norm, eager_norm, norm_parameters

from riformer_kernels.machine import threads

SHAPES = [(8, (1, 1)), (24, (9, 7)), (16, (17, 20)), (512, (7, 7)), (12, (5, 5)), (64, (28, 28)), (20, (33, 31))]


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize(("channels", "size"), SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
def test_shapes_and_layouts(isa, dtype, norm, channels, size, layout):
    check_norm(CPU.norm, Block(channels, size, dtype, norm, layout=layout), isa)


@per_isa
@per_norm
@pytest.mark.parametrize(("tokens_in", "out"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_result_of_another_dtype(isa, norm, tokens_in, out):
    check_norm(CPU.norm, Block(24, (9, 7), tokens_in, norm, parameters=out), isa, out)


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("values", ["small", "mean1000", "subnormal"])
def test_special_values(isa, dtype, norm, values):
    check_norm(CPU.norm, Block(16, (9, 7), dtype, norm, values=values), isa)


@per_isa
@per_norm
@pytest.mark.parametrize("channels", [24, 96, 320])
def test_large_mean_of_widths_that_are_no_power_of_two(isa, norm, channels):
    """One over the width is then rounded, and a mean that is multiplied by it with it."""
    check_norm(CPU.norm, Block(channels, (9, 7), norm=norm, values="mean1000"), isa)


@per_isa
@per_norm
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
def test_map_of_many_tiles(isa, norm, mean):
    """200x201 positions, 629 tiles: the last ones must still move the mean."""
    x = draws(0, torch.float32)(1, 8, 200, 201, mean=mean)
    weight, bias = norm_parameters(8, torch.float32, 0)
    found, eager = (f(x, weight, bias, EPS, norm == "ln") for f in (CPU.norm, eager_norm))
    golden = eager_norm(x.double(), weight.double(), bias.double(), EPS, norm == "ln")
    check_ratios(found, eager, golden, f"{isa}: norm {norm} of 200x201 positions, mean {mean}")


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("mean", [0.0, 1.0, -100.0, 1000.0])
def test_constant_image(isa, dtype, norm, mean):
    """What is left is the bias, up to the last digit of the mean times 1 / sqrt(eps)."""
    weight, bias = norm_parameters(16, dtype, 0)
    for size in ((1, 1), (9, 7), (17, 20)):
        x = torch.full((2, 16, *size), mean, dtype=dtype)
        out = CPU.norm(x, weight, bias, EPS, norm == "ln")
        allowed = 2.0**-23 * abs(mean) / EPS**0.5 * weight.double().abs() + torch.finfo(dtype).eps * bias.double().abs()
        assert out.isfinite().all()
        assert ((out.double() - bias.double().view(-1, 1, 1)).abs() <= allowed.view(-1, 1, 1)).all(), f"{isa} {size}"


@per_isa
@per_dtype
@per_norm
def test_every_layout_and_stride_gives_the_same_bits(isa, dtype, norm):
    case = Block(24, (9, 7), dtype)
    x, (weight, bias) = tokens(case, 0, 24), norm_parameters(24, dtype, 0)
    expected = CPU.norm(x, weight, bias, EPS, norm == "ln")
    for layout in LAYOUTS:
        found = CPU.norm(lay_out(x, layout), weight, bias, EPS, norm == "ln")
        first = slice(0, 1) if layout == "expanded" else slice(None)
        assert torch.equal(found[first], expected[first]), layout
    spread = torch.stack((weight, bias), 1)
    assert torch.equal(CPU.norm(x, spread[:, 0], spread[:, 1], EPS, norm == "ln"), expected)


@per_isa
@per_dtype
@per_norm
def test_same_bits_alone_in_any_batch_and_with_any_threads(isa, dtype, norm):
    for size in ((1, 1), (9, 7), (20, 21)):
        case = Block(24, size, dtype, batch=17)
        x, (weight, bias) = tokens(case, 0, 24), norm_parameters(24, dtype, 0)
        together = CPU.norm(x, weight, bias, EPS, norm == "ln")
        for batch, first in ((1, 0), (1, 16), (2, 3), (5, 12)):
            found = CPU.norm(x[first : first + batch], weight, bias, EPS, norm == "ln")
            assert torch.equal(found, together[first : first + batch])
        for count in (2, 3, 4):
            with threads(count):
                assert torch.equal(CPU.norm(x, weight, bias, EPS, norm == "ln"), together)


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_stays_in_its_image(isa, dtype, norm, value):
    case = Block(24, (9, 7), dtype)
    x, (weight, bias) = tokens(case, 0, 24), norm_parameters(24, dtype, 0)
    clean = CPU.norm(x, weight, bias, EPS, norm == "ln")
    x[1, 5, 3, 3] = value
    found = CPU.norm(x, weight, bias, EPS, norm == "ln")
    golden = eager_norm(x.double(), weight.double(), bias.double(), EPS, norm == "ln")
    assert torch.equal(found[0::2], clean[0::2]) and torch.equal(found.isnan(), golden.isnan())


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("shape", [(0, 16, 7, 7), (3, 16, 0, 7), (0, 16, 1, 1)])
def test_empty(isa, dtype, norm, shape):
    weight, bias = norm_parameters(16, dtype, 0)
    x = torch.empty(shape, dtype=dtype)
    moments = torch.zeros(shape[0], 2, 16)
    assert OPS.norm(x, moments, weight, bias, EPS, norm == "ln", torch.float32).shape == shape
