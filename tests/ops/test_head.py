"""``head``: final norm, average pooling and the classifier, on every instruction set of this machine."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support_ops import (  # noqa: F401
    DTYPES,
    EPS,
    LAYOUTS,
    OPS,
    Block,
    check_ratios,
    draws,
    eager_norm,
    isa_fixture,
    lay_out,
    one_thread,
    per_dtype,
    per_isa,
    per_norm,
    threads,
    tokens,
)


def native_head(x, p, per_position, dtype=None):
    moments = None if per_position else OPS.moments(x)
    return OPS.head(x, moments, p[0], p[1], EPS, p[2], p[3], per_position, dtype or x.dtype)


def eager_head(x, p, per_position):
    """As the model's norm and ClassifierHead compute it."""
    weight, bias, fc_weight, fc_bias = (None if v is None else v.to(x.dtype) for v in p)
    return F.linear(eager_norm(x, weight, bias, EPS, per_position).mean((-2, -1)), fc_weight, fc_bias)


def parameters_of(channels, classes, dtype, seed, bias=True):
    draw = draws(seed + 1, dtype)
    return [
        draw(channels, std=0.25, mean=1.0), draw(channels, std=0.25), draw(classes, channels, std=channels**-0.5),
        draw(classes, std=0.25) if bias else None,
    ]  # fmt: skip


def check_head(run, case, classes, isa, out_dtype=None, bias=True):
    """A batch has few scores: draws are pooled until there are 6,000. Few images or classes of few channels are left
    out: there MKL leaves its matrix product for dot products, whose error is 1.4 times less than with more of them."""
    found, eager, golden = [], [], []
    flag = case.norm == "ln"
    draw_count = min(64, -(-6000 // (case.batch * classes)))
    for seed in range(case.seed, case.seed + 2 * draw_count, 2):
        x = tokens(case, seed, case.channels)
        p = parameters_of(case.channels, classes, case.parameters or case.dtype, seed, bias)
        out = run(x, p, flag, out_dtype)
        assert out.dtype == (out_dtype or x.dtype) and out.shape == (case.batch, classes) and out.is_contiguous()
        found.append(out)
        eager.append(eager_head(x, p, flag).to(out.dtype))
        golden.append(eager_head(x.double(), [None if v is None else v.double() for v in p], flag))
    label = f"{isa}: head {case}, {classes} classes to {out_dtype}"
    check_ratios(torch.cat(found), torch.cat(eager), torch.cat(golden), label)


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize(
    ("channels", "size", "classes", "batch"),
    [(8, (1, 1), 40, 12), (24, (9, 7), 37, 12), (512, (7, 7), 1000, 1), (64, (17, 20), 97, 12), (12, (5, 5), 33, 40)],
)
def test_shapes(isa, dtype, norm, channels, size, classes, batch):
    check_head(native_head, Block(channels, size, dtype, norm, batch=batch, layout="nchw"), classes, isa)


@per_isa
@per_norm
@pytest.mark.parametrize(("tokens_in", "out"), itertools.product(DTYPES, DTYPES), ids=str)
def test_result_of_another_dtype(isa, norm, tokens_in, out):
    check_head(native_head, Block(24, (9, 7), tokens_in, norm, parameters=out, batch=12), 40, isa, out)


@per_isa
@per_dtype
@per_norm
def test_without_bias_and_with_special_values(isa, dtype, norm):
    check_head(native_head, Block(16, (9, 7), dtype, norm, batch=12), 40, isa, bias=False)
    for values in ("small", "mean1000", "subnormal"):
        check_head(native_head, Block(16, (9, 7), dtype, norm, values=values, batch=12), 40, isa)


@per_isa
@per_dtype
@per_norm
def test_every_layout_and_stride_gives_the_same_bits(isa, dtype, norm):
    case = Block(24, (9, 7), dtype)
    x, p = tokens(case, 0, 24), parameters_of(24, 10, dtype, 0)
    expected = native_head(x, p, norm == "ln")
    for layout in LAYOUTS:
        found = native_head(lay_out(x, layout), p, norm == "ln")
        first = slice(0, 1) if layout == "expanded" else slice(None)
        assert torch.equal(found[first], expected[first]), layout
    forms = [p[2].t().contiguous().t(), p[2][:, :, None, None], torch.cat((p[2], p[2]), 1)[:, :24]]
    for weight in forms:
        assert torch.equal(native_head(x, [p[0], p[1], weight, p[3]], norm == "ln"), expected), weight.stride()


@per_isa
@per_dtype
@per_norm
def test_same_bits_alone_in_any_batch_and_with_any_threads(isa, dtype, norm):
    case = Block(24, (9, 7), dtype, batch=53)  # more images than a panel of any instruction set has columns
    x, p = tokens(case, 0, 24), parameters_of(24, 37, dtype, 0)
    together = native_head(x, p, norm == "ln")
    for batch, first in ((1, 0), (1, 52), (2, 15), (5, 30), (17, 36)):
        assert torch.equal(native_head(x[first : first + batch], p, norm == "ln"), together[first : first + batch])
    for count in (2, 3, 4):
        with threads(count):
            for _ in range(2):
                assert torch.equal(native_head(x, p, norm == "ln"), together), count


@per_isa
@per_dtype
@per_norm
def test_a_score_does_not_depend_on_the_other_classes(isa, dtype, norm):
    case = Block(24, (9, 7), dtype)
    x, p = tokens(case, 0, 24), parameters_of(24, 37, dtype, 0)
    together = native_head(x, p, norm == "ln")
    for first, count in ((0, 1), (36, 1), (5, 9), (0, 8)):
        part = [p[0], p[1], p[2][first : first + count], p[3][first : first + count]]
        assert torch.equal(native_head(x, part, norm == "ln"), together[:, first : first + count])


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_stays_in_its_image(isa, dtype, norm, value):
    case = Block(24, (9, 7), dtype, batch=4)
    x, p = tokens(case, 0, 24), parameters_of(24, 10, dtype, 0)
    clean = native_head(x, p, norm == "ln")
    x[1, 5, 3, 3] = value
    found = native_head(x, p, norm == "ln")
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]]) and found[1].isnan().all()


@per_isa
@per_dtype
@per_norm
def test_empty(isa, dtype, norm):
    p = parameters_of(24, 10, dtype, 0)
    assert native_head(torch.empty(0, 24, 7, 7, dtype=dtype), p, norm == "ln").shape == (0, 10)
    none = [*p[:2], p[2][:0], p[3][:0]]
    assert native_head(torch.ones(3, 24, 7, 7, dtype=dtype), none, norm == "ln").shape == (3, 0)
