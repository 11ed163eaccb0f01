"""Every op's CUDA kernels on the emulator: the checks of the CPU kernels' tests, on cases that take each path."""

from __future__ import annotations

import pytest
import torch
from support_emulated import (  # noqa: F401
    OPS,
    OTHERS,
    architecture_fixture,
    device_fixture,
    emulated,
    run_block,
    run_block_,
    run_embed,
    run_head,
    run_norm,
)
from support_ops import (  # noqa: F401
    DTYPES,
    SEMANTICS,
    Block,
    all_pairs,
    block_parameters,
    check_block,
    check_moments,
    draws,
    lay_out,
    one_thread,
    per_dtype,
    per_norm,
    tokens,
)
from test_embed import DOWNSAMPLE, STEM, Embed, check_embed
from test_head import check_head
from test_norm import check_norm

HALF = (torch.bfloat16, torch.float16)
# 63 rows: one ragged slot of 64; 65: a second one with a single row; 49: the rows of several images in one slot.
GRID = all_pairs(
    Block, 4_000_000, channels=(16, 64, 96, 128, 192), size=((1, 1), (7, 7), (9, 7), (13, 5)), dtype=DTYPES,
    norm=("gn", "ln"), form=("training", "deployed", "unit"), residual=(True, False), hidden=(8, 64, 136, 256),
    layout=("nchw", "channels_last", "offset"), batch=(1, 3),
) + tuple(
    Block(channels, size, dtype, norm, form, batch=2, hidden=hidden, layout="channels_last", residual=channels > 320)
    for channels, size, hidden in ((320, (5, 5), 64), (384, (7, 7), 40), (512, (3, 3), 64))
    for dtype, norm, form in zip((*HALF, torch.float32), ("gn", "ln", "gn"), ("training", "deployed", "unit"))
)  # fmt: skip
# The models' own blocks, at the sizes of their stages or near them.
WHOLE = (
    Block(64, (56, 56), torch.bfloat16, batch=1, layout="channels_last", form="deployed"),
    Block(64, (14, 14), torch.float16, batch=3),
    Block(96, (17, 20), torch.float16, "ln", batch=1, layout="channels_last"),
    Block(96, (28, 28), torch.bfloat16, batch=1, form="deployed", residual=False),
    Block(128, (28, 28), torch.bfloat16, batch=1, layout="channels_last"),
    Block(192, (14, 14), torch.float16, batch=2, residual=False),
    Block(320, (14, 14), torch.bfloat16, batch=1, layout="channels_last"),
    Block(320, (5, 5), torch.float16, "ln", batch=2),
    Block(384, (14, 14), torch.bfloat16, batch=1, residual=False),
    Block(512, (7, 7), torch.bfloat16, batch=2, layout="channels_last"),
    Block(768, (7, 7), torch.float16, "ln", batch=1, layout="channels_last"),
    Block(768, (7, 7), torch.bfloat16, batch=2, form="deployed"),
)


@pytest.mark.parametrize("case", SEMANTICS, ids=str)
def test_block_semantics(case):
    """All float32, whose kernels are the same for every architecture."""
    check_block(run_block, case)


@pytest.mark.parametrize("case", [*GRID, *WHOLE], ids=str)
def test_block(device, case):
    check_block(run_block, case)


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("channels", [16, 64, 96, 128, 192, 320, 384, 512, 768])
def test_block_where_shared_memory_is_less(architecture, processors, channels):
    with emulated(architecture, processors):
        for dtype in (torch.float32, torch.bfloat16):
            check_block(run_block, Block(channels, (7, 5), dtype, batch=2, hidden=64, layout="channels_last"))


@pytest.mark.parametrize(
    "case",
    [
        Block(16, dtype=torch.bfloat16, hidden=64),
        Block(16, norm="ln"),
        Block(96, (13, 5), torch.float16, layout="channels_last", hidden=40, batch=2),
        Block(384, (7, 7), torch.bfloat16, layout="channels_last", batch=2, hidden=40),
        Block(16, (9, 7), torch.bfloat16, layout="offset", hidden=64),
    ],
    ids=str,
)
def test_block_in_place(architecture, case):
    check_block(run_block_, case)


@per_dtype
@per_norm
@pytest.mark.parametrize("channels", [24, 208])
def test_absent_arguments(architecture, dtype, norm, channels):
    absent = ("fc1_bias", "fc2_bias", "layer_scale_2", "affine_bias")
    check_block(run_block, Block(channels, (5, 5), dtype, norm, absent=absent, batch=1, hidden=40))


@per_norm
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_parameters_of_another_dtype(architecture, norm, parameters):
    for dtype in set(HALF) - {parameters}:
        check_block(run_block, Block(40, (9, 7), dtype, norm, residual=False, parameters=parameters, hidden=72))


@per_dtype
@per_norm
@pytest.mark.parametrize("values", ["small", "mean1000"])
@pytest.mark.parametrize("channels", [16, 64])
def test_special_values(device, dtype, norm, values, channels):
    check_block(run_block, Block(channels, (9, 7), dtype, norm, values=values, residual=False, hidden=64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_parameters_give_the_same_bits(dtype):
    case = Block(24, (7, 5), dtype, hidden=40)
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


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_tokens_give_the_same_bits(dtype, layout):
    case = Block(24, (7, 5), dtype, hidden=40)
    x, parameters = lay_out(tokens(case, 0, 24), layout), block_parameters(case, 0)
    expected = run_block(x.contiguous(memory_format=torch.channels_last), parameters)
    found = run_block(x, parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    assert found[0].is_contiguous()


# ---------------------------------------------------------------------------------------------------- the other ops

EMBEDS = [
    Embed(3, 16, **STEM, size=(33, 32)),
    Embed(3, 96, **STEM, size=(9, 7), layout="channels_last", batch=1),
    Embed(3, 8, **STEM, size=(40, 41), dtype=torch.float16, layout="sliced"),
    Embed(3, 64, **STEM, size=(33, 32), dtype=torch.bfloat16, images=torch.float32, parameters=torch.float32, batch=1),
    Embed(3, 64, **STEM, size=(33, 32), dtype=torch.float16, images=torch.bfloat16, batch=1),
    Embed(16, 24, **DOWNSAMPLE, size=(17, 20), layout="channels_last"),
    Embed(16, 24, **DOWNSAMPLE, size=(17, 20), layout="channels_last", dtype=torch.bfloat16),
    Embed(24, 40, **DOWNSAMPLE, size=(9, 7), layout="channels_last", weight_layout="channels_last"),
    Embed(96, 192, **DOWNSAMPLE, size=(9, 9), layout="channels_last", batch=1, dtype=torch.bfloat16),
    Embed(128, 320, **DOWNSAMPLE, size=(7, 7), layout="channels_last", batch=1, dtype=torch.float16),
    Embed(15, 24, **DOWNSAMPLE, size=(9, 7), bias=False),
    Embed(64, 320, **DOWNSAMPLE, size=(1, 1), batch=3),
    Embed(20, 40, (3, 5), 3, 0, size=(9, 13), layout="channels_last", weight_layout="strided"),
    Embed(16, 24, **DOWNSAMPLE, size=(9, 7), layout="expanded"),
]  # fmt: skip


@pytest.mark.parametrize("case", EMBEDS, ids=str)
def test_embed(case):
    check_embed(run_embed, case)


def test_embed_without_moments():
    out, found = OPS.embed(torch.ones(2, 3, 9, 8), torch.ones(8, 3, 3, 3), None, 2, 1, torch.float32, False)
    assert found.shape == (2, 2, 0) and (out[:, :, 1, 1] == 27).all()


@per_dtype
@per_norm
@pytest.mark.parametrize(("channels", "size"), [(24, (9, 7)), (96, (17, 20)), (320, (5, 5)), (64, (1, 1))], ids=str)
def test_norm(dtype, norm, channels, size):
    check_norm(run_norm, Block(channels, size, dtype, norm, layout="channels_last"), "")


@per_norm
@pytest.mark.parametrize("values", ["small", "mean1000"])
def test_norm_of_special_values(norm, values):
    check_norm(run_norm, Block(16, norm=norm, values=values), "")


@per_norm
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_norm_and_head_into_another_dtype(norm, out):
    case = Block(24, (5, 7), torch.bfloat16, norm, batch=12)
    check_norm(run_norm, case, "", out)
    check_head(run_head, case, 64, "", out)


@per_dtype
@per_norm
@pytest.mark.parametrize(("channels", "size", "classes"), [(64, (7, 7), 100), (320, (3, 3), 500)])
def test_head(dtype, norm, channels, size, classes):
    check_head(run_head, Block(channels, size, dtype, norm, batch=12), classes, "")


@per_dtype
@pytest.mark.parametrize("shape", [(3, 8, 9, 7), (1, 96, 17, 20), (2, 320, 1, 1), (1, 16, 48, 48)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_moments(dtype, shape, mean):
    x = (mean + draws(0, torch.float32)(*shape)).to(dtype)
    for layout in ("nchw", "channels_last", "sliced"):
        check_moments(OPS.moments(lay_out(x, layout)), x, f"{dtype} {shape} {layout}")
