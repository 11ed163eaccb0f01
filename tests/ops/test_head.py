"""``head``: final norm, average pooling and the classifier, on every instruction set of this machine."""

from __future__ import annotations

import itertools

import pytest
import torch
from support_block import Block
from support_cases import DTYPES, LAYOUTS, lay_out, per_dtype, per_norm, tokens
from support_cpu import CPU, per_isa
from support_head import check_head, head_parameters

from riformer_kernels.machine import threads


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize(
    ("channels", "size", "classes", "batch"),
    [(8, (1, 1), 40, 12), (24, (9, 7), 37, 12), (512, (7, 7), 1000, 1), (64, (17, 20), 97, 12), (12, (5, 5), 33, 40)],
)
def test_shapes(isa, dtype, norm, channels, size, classes, batch):
    check_head(CPU.head, Block(channels, size, dtype, norm, batch=batch, layout="nchw"), classes, isa)


@per_isa
@per_norm
@pytest.mark.parametrize(("tokens_in", "out"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_result_of_another_dtype(isa, norm, tokens_in, out):
    check_head(CPU.head, Block(24, (9, 7), tokens_in, norm, parameters=out, batch=12), 40, isa, out)


@per_isa
@per_dtype
@per_norm
def test_without_bias_and_with_special_values(isa, dtype, norm):
    check_head(CPU.head, Block(16, (9, 7), dtype, norm, batch=12), 40, isa, bias=False)
    for values in ("small", "mean1000", "subnormal"):
        check_head(CPU.head, Block(16, (9, 7), dtype, norm, values=values, batch=12), 40, isa)


@per_isa
@per_dtype
@per_norm
def test_every_layout_and_stride_gives_the_same_bits(isa, dtype, norm):
    case = Block(24, (9, 7), dtype)
    x, p = tokens(case, 0, 24), head_parameters(24, 10, dtype, 0)
    expected = CPU.head(x, p, norm == "ln")
    for layout in LAYOUTS:
        found = CPU.head(lay_out(x, layout), p, norm == "ln")
        first = slice(0, 1) if layout == "expanded" else slice(None)
        assert torch.equal(found[first], expected[first]), layout
    forms = [p[2].t().contiguous().t(), p[2][:, :, None, None], torch.cat((p[2], p[2]), 1)[:, :24]]
    for weight in forms:
        assert torch.equal(CPU.head(x, [p[0], p[1], weight, p[3]], norm == "ln"), expected), weight.stride()


@per_isa
@per_dtype
@per_norm
def test_same_bits_alone_in_any_batch_and_with_any_threads(isa, dtype, norm):
    case = Block(24, (9, 7), dtype, batch=53)  # more images than a panel of any instruction set has columns
    x, p = tokens(case, 0, 24), head_parameters(24, 37, dtype, 0)
    together = CPU.head(x, p, norm == "ln")
    for batch, first in ((1, 0), (1, 52), (2, 15), (5, 30), (17, 36)):
        assert torch.equal(CPU.head(x[first : first + batch], p, norm == "ln"), together[first : first + batch])
    for count in (2, 3, 4):
        with threads(count):
            for _ in range(2):
                assert torch.equal(CPU.head(x, p, norm == "ln"), together), count


@per_isa
@per_dtype
@per_norm
def test_a_score_does_not_depend_on_the_other_classes(isa, dtype, norm):
    case = Block(24, (9, 7), dtype)
    x, p = tokens(case, 0, 24), head_parameters(24, 37, dtype, 0)
    together = CPU.head(x, p, norm == "ln")
    for first, count in ((0, 1), (36, 1), (5, 9), (0, 8)):
        part = [p[0], p[1], p[2][first : first + count], p[3][first : first + count]]
        assert torch.equal(CPU.head(x, part, norm == "ln"), together[:, first : first + count])


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_stays_in_its_image(isa, dtype, norm, value):
    case = Block(24, (9, 7), dtype, batch=4)
    x, p = tokens(case, 0, 24), head_parameters(24, 10, dtype, 0)
    clean = CPU.head(x, p, norm == "ln")
    x[1, 5, 3, 3] = value
    found = CPU.head(x, p, norm == "ln")
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]]) and found[1].isnan().all()


@per_isa
@per_dtype
@per_norm
def test_empty(isa, dtype, norm):
    p = head_parameters(24, 10, dtype, 0)
    assert CPU.head(torch.empty(0, 24, 7, 7, dtype=dtype), p, norm == "ln").shape == (0, 10)
    none = [*p[:2], p[2][:0], p[3][:0]]
    assert CPU.head(torch.ones(3, 24, 7, 7, dtype=dtype), none, norm == "ln").shape == (3, 0)
