"""``moments``, the statistics pass, and which instruction sets all of these tests ran on."""

from __future__ import annotations

import pytest
import torch
from support_cases import LAYOUTS, draws, lay_out, per_dtype
from support_cpu import OPS, need_native, per_isa
from support_moments import check_moments

from riformer_kernels import BackendError
from riformer_kernels.backends import cpu
from riformer_kernels.machine import threads

SHAPES = [(3, 8, 1, 1), (5, 16, 5, 5), (1, 24, 9, 7), (2, 3, 17, 20), (2, 64, 28, 28), (1, 7, 56, 56), (1, 2, 200, 201)]


@pytest.mark.parametrize("name", cpu.isa_status()["compiled"])
def test_instruction_set_is_tested_here(name):
    """One skip per instruction set that this machine cannot run: the rest of the op tests do not mention it."""
    status = cpu.isa_status()
    if name not in status["supported"]:
        with pytest.raises(BackendError, match=f"this machine lacks .*which instruction set '{name}' needs"):
            cpu.select_isa(name)
        lacking = [feature for feature, found in status["features"].items() if not found]
        pytest.skip(f"NOT TESTED: instruction set {name}; this machine lacks {', '.join(lacking)}")
    before = status["chosen"]
    cpu.select_isa(name)
    assert cpu.isa_status()["chosen"] == name
    cpu.select_isa(before)


def test_unknown_instruction_set_changes_nothing():
    need_native()
    before = cpu.isa_status()["chosen"]
    with pytest.raises(BackendError, match="unknown instruction set 'neon': expected one of"):
        cpu.select_isa("neon")
    assert cpu.isa_status()["chosen"] == before


@per_isa
@per_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 3e-3), (1000.0, 1.0)])
def test_values(isa, dtype, shape, mean, std):
    x = draws(0, dtype)(*shape, mean=mean, std=std)
    check_moments(OPS.moments(x), x, f"{isa} {dtype} {shape} N({mean}, {std})")


@per_isa
@per_dtype
@pytest.mark.parametrize("value", [0.0, 1.0, -1000.0, 1e-5])
def test_constant(isa, dtype, value):
    x = torch.full((2, 8, 17, 20), value, dtype=dtype)
    moments = OPS.moments(x)
    check_moments(moments, x, f"{isa} {dtype} {value}")
    assert (moments[:, 1] >= 0).all()


@per_isa
@per_dtype
def test_every_layout_gives_the_same_bits(isa, dtype):
    x = draws(0, dtype)(3, 24, 19, 15)
    expected = OPS.moments(x)
    for layout in LAYOUTS:
        found = OPS.moments(lay_out(x, layout))
        first = slice(0, 1) if layout == "expanded" else slice(None)
        assert torch.equal(found[first], expected[first]) and found.is_contiguous(), layout


@per_isa
@per_dtype
@pytest.mark.parametrize("size", [(1, 1), (9, 7), (16, 16), (257, 1), (28, 28)])
def test_same_bits_alone_in_any_batch_and_with_any_threads(isa, dtype, size):
    x = draws(0, dtype)(17, 24, *size)
    together = OPS.moments(x)
    for batch, first in ((1, 0), (1, 16), (2, 3), (5, 12)):
        assert torch.equal(OPS.moments(x[first : first + batch]), together[first : first + batch])
    for count in (2, 3, 4):
        with threads(count):
            assert torch.equal(OPS.moments(x), together)


@per_isa
@per_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_stays_in_its_channel(isa, dtype, value):
    x = draws(0, dtype)(3, 24, 9, 7)
    clean = OPS.moments(x)
    x[1, 5, 3, 3] = value
    found = OPS.moments(x)
    touched = torch.zeros_like(found, dtype=torch.bool)
    touched[1, :, 5] = True
    assert torch.equal(found.isfinite(), ~touched) and torch.equal(found[~touched], clean[~touched])


@per_isa
@per_dtype
def test_empty(isa, dtype):
    for shape in ((0, 16, 7, 7), (0, 16, 0, 7), (3, 0, 7, 7)):
        assert OPS.moments(torch.empty(shape, dtype=dtype)).shape == (shape[0], 2, shape[1])
