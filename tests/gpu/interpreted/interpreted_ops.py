"""Every op's Triton kernels in the interpreter: the checks of the CPU kernels' tests, on cases that take each path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support_interpreted import (  # noqa: F401
    bfloat16_products,
    force,
    guarded,
    run_block,
    run_block_,
    run_embed,
    run_head,
    run_norm,
    surrounded,
)
from support_ops import (  # noqa: F401
    EPS,
    SEMANTICS,
    Block,
    all_pairs,
    block_parameters,
    check_block,
    check_moments,
    draws,
    lay_out,
    one_thread,
    tokens,
)
from test_embed import DOWNSAMPLE, STEM, Embed, check_embed, embed_parameters
from test_head import check_head, parameters_of
from test_norm import check_norm

from riformer_kernels.backends.triton import _launch, block, choice, moments

# The interpreter's bfloat16 products are wrong. That dtype differs from float16 by no line of the kernels; a few cases
# run with the products put right.
FLOAT = (torch.float32, torch.float16)
per_dtype = pytest.mark.parametrize("dtype", FLOAT, ids=str)
per_norm = pytest.mark.parametrize("norm", ["gn", "ln"])

# 63 rows: one ragged tile of 64; 65: a second one with a single row.
GRID = all_pairs(
    Block, 12_000_000, channels=(8, 40, 96, 320), size=((9, 7), (13, 5)), dtype=FLOAT, norm=("gn", "ln"),
    form=("training", "unit"), residual=(True, False), layout=("nchw", "channels_last", "offset"), batch=(1, 3),
) + (
    Block(64, (17, 20), torch.float16, batch=1, layout="channels_last"),
    Block(192, (9, 7), torch.float16, "ln", batch=1, layout="transposed"),
    Block(24, (17, 20), layout="expanded"),
    Block(208, (3, 3), form="deployed", batch=1, layout="sliced"),
)  # fmt: skip


@pytest.mark.parametrize("case", SEMANTICS, ids=str)
def test_block_semantics(case):
    check_block(run_block, case)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_block_grid(case):
    check_block(run_block, case)


@pytest.mark.parametrize(
    "case",
    [Block(64, (9, 7)), Block(40, (9, 7), norm="ln", residual=False), Block(208, (7, 7), batch=1, form="unit"),
     Block(96, (9, 7), parameters=torch.float32, residual=False)],
    ids=str,
)  # fmt: skip
def test_block_in_bfloat16(bfloat16_products, case):
    check_block(run_block, replace(case, dtype=torch.bfloat16, layout="channels_last"))


WIDE = Block(320, (7, 7), batch=1, layout="channels_last")
PATHS = [
    (Block(96, (9, 7), batch=1, residual=False), choice.BlockChoice(None, *[choice.MatrixTile(32, 64, 32, 4, 2)] * 2)),
    (Block(24, (13, 5), norm="ln"), choice.BlockChoice(None, *[choice.MatrixTile(16, 32, 16, 4, 2)] * 2)),
    (WIDE, choice.BlockChoice(choice.FusedTile(64, 64, 64, 8, 2))),
    (replace(WIDE, norm="ln", dtype=torch.float16), choice.BlockChoice(choice.FusedTile(32, 64, 32, 4, 2))),
    (Block(40, (9, 7), hidden=72, residual=False), choice.BlockChoice(choice.FusedTile(16, 16, 32, 4, 1))),
]  # fmt: skip


@pytest.mark.parametrize(("case", "chosen"), PATHS, ids=str)
def test_each_variant_at_widths_that_the_table_gives_to_the_other(force, case, chosen):
    force(chosen)
    check_block(run_block, case)


@pytest.mark.parametrize(
    "case",
    [
        Block(16),
        Block(16, norm="ln"),
        Block(16, layout="channels_last"),
        Block(320, (5, 5), layout="channels_last", batch=1),
    ],
    ids=str,
)
def test_block_in_place(case):
    check_block(run_block_, case)


@per_dtype
@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("channels", [24, 208])
def test_absent_arguments(dtype, norm, channels):
    absent = ("fc1_bias", "fc2_bias", "layer_scale_2", "affine_bias")
    check_block(run_block, Block(channels, (5, 5), dtype, norm, absent=absent, batch=1))


@per_norm
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype(norm, parameters):
    check_block(run_block, Block(40, (9, 7), torch.float16, norm, residual=False, parameters=parameters, hidden=72))


@per_dtype
@per_norm
@pytest.mark.parametrize("values", ["small", "mean1000"])
def test_special_values(dtype, norm, values):
    check_block(run_block, Block(16, (9, 7), dtype, norm, values=values, residual=False))


def test_layouts_of_parameters_give_the_same_bits():
    case = Block(24, (7, 5), hidden=40)
    x, parameters = tokens(case, 0, 24), block_parameters(case, 0)
    expected = run_block(x, parameters)
    for layout in ("channels_last", "transposed", "strided", "offset"):
        changed = {key: lay_out(parameters[key], layout) for key in ("fc1_weight", "fc2_weight")}
        found = run_block(x, parameters | changed)
        assert all(torch.equal(one, other) for one, other in zip(found, expected)), layout
    spread = {
        k: v.repeat_interleave(2)[::2] for k, v in parameters.items() if isinstance(v, torch.Tensor) and v.dim() == 1
    }
    assert torch.equal(run_block(x, parameters | spread)[0], expected[0])


# ---------------------------------------------------------------------------------------------------- the other ops

EMBEDS = [
    Embed(3, 16, **STEM, size=(33, 32)),
    Embed(3, 96, **STEM, size=(9, 7), layout="channels_last", batch=1),
    Embed(3, 8, **STEM, size=(40, 41), dtype=torch.float16, layout="sliced"),
    Embed(3, 64, **STEM, size=(33, 32), dtype=torch.float16, images=torch.float32, parameters=torch.float32, batch=1),
    Embed(16, 24, **DOWNSAMPLE, size=(17, 20), layout="channels_last"),
    Embed(24, 40, **DOWNSAMPLE, size=(9, 7), layout="channels_last", weight_layout="channels_last"),
    Embed(96, 192, **DOWNSAMPLE, size=(9, 9), layout="channels_last", batch=1),
    Embed(128, 320, **DOWNSAMPLE, size=(7, 7), layout="channels_last", batch=1, dtype=torch.float16),
    Embed(15, 24, **DOWNSAMPLE, size=(9, 7), bias=False),
    Embed(64, 320, **DOWNSAMPLE, size=(1, 1), batch=3),
    Embed(20, 40, (3, 5), 3, 0, size=(9, 13), layout="channels_last", weight_layout="strided"),
    Embed(16, 24, **DOWNSAMPLE, size=(9, 7), layout="expanded"),
]  # fmt: skip


@pytest.mark.parametrize("case", EMBEDS, ids=str)
def test_embed(case):
    check_embed(run_embed, case)


def test_embed_in_bfloat16(bfloat16_products):
    check_embed(run_embed, Embed(3, 16, **STEM, size=(33, 32), dtype=torch.bfloat16))
    check_embed(run_embed, Embed(16, 24, **DOWNSAMPLE, dtype=torch.bfloat16, layout="channels_last"))


@per_dtype
@per_norm
@pytest.mark.parametrize(("channels", "size"), [(24, (9, 7)), (96, (17, 20)), (320, (5, 5)), (64, (1, 1))], ids=str)
def test_norm(dtype, norm, channels, size):
    check_norm(run_norm, Block(channels, size, dtype, norm, layout="channels_last"), "")


@per_norm
@pytest.mark.parametrize("values", ["small", "mean1000"])
def test_norm_of_special_values(norm, values):
    check_norm(run_norm, Block(16, norm=norm, values=values), "")


@per_dtype
@per_norm
@pytest.mark.parametrize(("channels", "size", "classes"), [(64, (7, 7), 100), (320, (3, 3), 1000)])
def test_head(dtype, norm, channels, size, classes):
    check_head(run_head, Block(channels, size, dtype, norm, batch=12), classes, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 9, 7), (1, 96, 17, 20), (2, 320, 1, 1), (1, 5, 48, 48)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_moments(dtype, shape, mean):
    x = (mean + draws(0, torch.float32)(*shape)).to(dtype)
    check_moments(moments.moments(x), x, f"{dtype} {shape}")


# ---------------------------------------------------------------------------------------------- what is promised besides


CHOSEN = [Block(16, (9, 7)), Block(96, (9, 9), torch.float16), Block(208, (9, 7), hidden=64), Block(24, norm="ln")]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_an_image_gives_the_same_bits_alone_and_in_a_batch(case):
    case = replace(case, batch=3, layout="channels_last")
    x, parameters = tokens(case, 0, case.channels), block_parameters(case, 0)
    out, found = run_block(x, parameters)
    again, found_again = run_block(x, parameters)
    assert torch.equal(out, again) and torch.equal(found, found_again)
    for index in range(3):
        alone, found_alone = run_block(x[index : index + 1], parameters)
        assert torch.equal(alone[0], out[index]) and torch.equal(found_alone[0], found[index])


def test_embed_gives_the_same_bits_alone_and_in_a_batch():
    """225 x 193: the second image does not start on a 16-byte boundary."""
    case = Embed(3, 8, **STEM, size=(25, 19), batch=2)
    x, parameters = tokens(case, 0, 3), embed_parameters(case, 0)
    out, found = run_embed(x, parameters, torch.float32)
    alone, found_alone = run_embed(x[1:], parameters, torch.float32)
    assert torch.equal(alone[0], out[1]) and torch.equal(found_alone[0], found[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_a_bad_image_poisons_itself_alone(case, value):
    case = replace(case, batch=3, layout="channels_last")
    x, parameters = tokens(case, 0, case.channels), block_parameters(case, 0)
    expected, _ = run_block(x, parameters)
    x[1, -1, -1, -1] = value
    out, _ = run_block(x, parameters)
    assert torch.equal(out[::2], expected[::2])
    bad = out[1].isnan()
    assert bad[:, -1, -1].all() if case.norm == "ln" else bad.all()


@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_empty_batch(norm):
    case = Block(16, norm=norm, batch=0)
    out, found = run_block(torch.empty(0, 16, 9, 7), block_parameters(case, 0))
    assert out.shape == (0, 16, 9, 7) and found.shape == (0, 2, 0 if norm == "ln" else 16)
    parameters = embed_parameters(Embed(batch=0), 0)
    out, found = run_embed(torch.empty(0, 3, 17, 20), parameters, torch.float32)
    assert out.shape == (0, 16, 9, 10) and found.shape == (0, 2, 16)
    weights = parameters_of(16, 10, torch.float32, 0)
    assert run_head(torch.empty(0, 16, 2, 2), weights, norm == "ln").shape == (0, 10)
    assert run_norm(torch.empty(0, 16, 2, 2), *weights[:2], EPS, norm == "ln").shape == (0, 16, 2, 2)


@pytest.mark.parametrize("case", [*CHOSEN, Block(320, (5, 5), batch=1, norm="ln")], ids=str)
def test_block_stays_inside_its_tensors_and_writes_all_of_them(case):
    case = replace(case, layout="channels_last")
    x, parameters = tokens(case, 0, case.channels), block_parameters(case, 0)
    expected, expected_moments = run_block(x, parameters)
    around = {key: surrounded(value) for key, value in parameters.items()}
    inner = surrounded(x)
    with guarded():
        out, found = run_block(inner, around)
    assert torch.equal(out, expected) and torch.equal(found, expected_moments) and torch.equal(inner, x)


@pytest.mark.parametrize("case", EMBEDS[:6], ids=str)
def test_embed_stays_inside_its_tensors_and_writes_all_of_them(case):
    case = replace(case, batch=2)
    x, parameters = tokens(case, 0, case.in_channels), embed_parameters(case, 0)
    expected, expected_moments = run_embed(x, parameters, case.dtype)
    dense = case.layout in ("nchw", "channels_last")
    with guarded():
        out, found = run_embed(
            surrounded(x) if dense else x, {key: surrounded(value) for key, value in parameters.items()}, case.dtype
        )
    assert torch.equal(out, expected) and torch.equal(found, expected_moments)


@per_norm
def test_norm_and_head_stay_inside_their_tensors_and_write_all_of_them(norm):
    case = Block(40, (9, 7), norm=norm, layout="channels_last")
    x, weights = tokens(case, 0, 40), parameters_of(40, 33, torch.float32, 0)
    expected = run_norm(x, *weights[:2], EPS, norm == "ln"), run_head(x, weights, norm == "ln")
    around = [surrounded(weight) for weight in weights]
    with guarded():
        found = run_norm(surrounded(x), *around[:2], EPS, norm == "ln"), run_head(surrounded(x), around, norm == "ln")
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_each_launch_makes_the_tensors_device_current():
    guard = _launch.on(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device) and guard.idx == 1


def test_tensors_elsewhere_are_refused(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    case = Block(16)
    with pytest.raises(Exception, match="serve cuda tensors, found one on cpu"):
        block.block(tokens(case, 0, 16), torch.zeros(3, 2, 16), *list(block_parameters(case, 0).values()))
