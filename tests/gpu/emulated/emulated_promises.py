"""What the CUDA kernels promise besides what every target does: an order that changes no bit, forms of a block that
agree, and whole models. On the emulator."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace

import pytest
import torch
from riformer.model import RIFormer
from riformer.randomize import randomize_
from support_block import PARAMETERS, Block, block_parameters
from support_cases import DTYPES, check_ratios, tokens
from support_compare import same
from support_embed import DOWNSAMPLE, STEM, Embed, embed_parameters
from support_emulated import ARCHITECTURES, BACKEND, NAME, OPS, choice, emulated, seed
from support_emulated import EMULATED as TARGET

import riformer_kernels
from riformer_kernels import Engine, VerificationError, backends, verification

HALF, BRAIN = torch.float16, torch.bfloat16
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Each way of giving rows to slots: an image per slot, several slots per image, several images per slot; both forms of a
# block, with and without the hidden tensor in memory; and float32.
CASES = (
    Block(16, (9, 7), hidden=40),
    Block(64, (13, 5), BRAIN, hidden=64),
    Block(128, (7, 7), HALF, hidden=64),
    Block(384, (5, 5), BRAIN, hidden=64),
    Block(24, (9, 7), BRAIN, "ln", hidden=40),
    Block(96, (14, 14), HALF, hidden=384),
    Block(320, (14, 14), BRAIN, "ln", hidden=64),
)
EMBEDS = (
    Embed(3, 8, **STEM, size=(25, 19), dtype=BRAIN),  # the second image does not start on a 16-byte boundary
    Embed(16, 24, **DOWNSAMPLE, size=(9, 7), layout="channels_last"),
)
per_case = pytest.mark.parametrize("case", [replace(case, layout="channels_last") for case in CASES], ids=str)
per_embed = pytest.mark.parametrize("case", EMBEDS, ids=str)


def arguments_of(case: Block):
    return tokens(case, 0, case.channels), block_parameters(case, 0)


# -------------------------------------------------------------------------------------------------------------- bits


@per_case
def test_the_order_of_warps_and_copies_changes_no_bit(architecture, case):
    x, parameters = arguments_of(case)
    expected = TARGET.block(x, parameters)
    for value in range(1, 5):
        seed(value)
        assert same(TARGET.block(x, parameters), expected), f"seed {value}"


@per_embed
def test_the_order_of_warps_and_copies_changes_no_bit_of_an_embedding(case):
    x, parameters = tokens(case, 0, case.in_channels), embed_parameters(case, 0)
    expected = TARGET.embed(x, parameters, case.dtype)
    for value in range(1, 4):
        seed(value)
        assert same(TARGET.embed(x, parameters, case.dtype), expected), f"seed {value}"


@pytest.mark.parametrize("layout", ["nchw", "sliced", "offset"])
def test_in_place_where_the_kernels_cannot_write(layout):
    """They work on a copy, which is copied back, moments too."""
    case = Block(16, (5, 7), hidden=40, layout=layout)
    x, parameters = arguments_of(case)
    expected = TARGET.block(x, parameters)
    statistics = torch.empty(3, 4, 16)[:, ::2]
    statistics.copy_(OPS.moments(x))
    OPS.block_(x, statistics, *(parameters[name] for name in PARAMETERS))
    assert same((x, statistics), expected)


@per_case
def test_each_form_of_a_block_gives_the_same_bits(architecture, case):
    """How many multiprocessors there are, and how many rows for them, decides between one kernel and two, in tiles for
    many rows or for few. A GPU with one has always many rows, one with 1000 has always few."""
    x, parameters = arguments_of(case)
    expected = TARGET.block(x, parameters)
    for processors in (1, 1000):
        with emulated(architecture, processors):
            assert same(TARGET.block(x, parameters), expected), processors


def test_the_cases_take_every_form():
    forms = {choice(case, architecture, many) for case in CASES for architecture in ARCHITECTURES for many in (1, 1000)}
    assert len(forms) > len(CASES), forms


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_of_the_models_has_kernels(architecture, dtype):
    """At 224 and at 384 pixels, alone and in a batch, on the largest GPU."""
    for channels in (64, 96, 128, 192, 320, 384, 512, 768):
        for side in (7, 12, 14, 24, 28, 48, 56, 96):
            for batch in (1, 64):
                found = choice(Block(channels, (side, side), dtype, batch=batch), architecture, 132)
                assert found and "riformer" not in found, found


# ------------------------------------------------------------------------------------------------------------- models

TINY = {"layers": [1, 1, 2, 1], "embed_dims": [16, 24, 40, 200]}


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setitem(backends.ALL, NAME, BACKEND)


def tiny(dtype: torch.dtype = torch.float32, **options: object) -> RIFormer:
    return randomize_(RIFormer(TINY, **options), 0).to(dtype).eval()


@pytest.mark.parametrize(
    ("dtype", "norm", "deploy", "layout", "size"),
    [
        (torch.float32, "gn", False, "nchw", (49, 33)),
        (BRAIN, "gn", True, "channels_last", (65, 64)),
        (HALF, "ln", True, "nchw", (32, 32)),
    ],
    ids=str,
)
def test_model(backend, architecture, dtype, norm, deploy, layout, size):
    options = {} if norm == "gn" else {"norm": norm}
    model = tiny(dtype, deploy=deploy, num_classes=300, **options).to(memory_format=FORMATS[layout])
    images = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(1)).to(dtype)
    images = images.contiguous(memory_format=FORMATS[layout])
    with torch.inference_mode():
        eager, golden = model(images), copy.deepcopy(model).double()(images.double())
        handle = riformer_kernels.patch(model, backend=NAME, verify=False)
        assert all(row.backend == f"{NAME} (emulator)" for row in handle.report), str(handle)
        check_ratios(model(images), eager, golden, f"{dtype} {layout} {size}")


def test_patch_verifies_and_sees_a_broken_kernel(backend, monkeypatch):
    handle = riformer_kernels.patch(tiny(num_classes=300), backend=NAME, image_size=32)
    assert all(row.reason is None for row in handle.report) and handle.verification[""].passed
    block = BACKEND.ops["block"]
    broken = dataclasses.replace(
        BACKEND, ops=BACKEND.ops | {"block": lambda *arguments: block(*arguments[:10], 0.1, *arguments[11:])}
    )  # eps2
    monkeypatch.setitem(backends.ALL, NAME, broken)
    monkeypatch.setattr(verification, "MORE_BATCHES", 0)
    with pytest.raises(VerificationError):
        riformer_kernels.patch(tiny(), backend=NAME, image_size=32)


def test_layouts_and_batches_of_a_model_give_the_same_bits(backend):
    model = tiny(BRAIN, num_classes=10)
    riformer_kernels.patch(model, backend=NAME, verify=False)
    x = torch.randn(3, 3, 17, 24).bfloat16()
    with torch.inference_mode():
        out = model(x)
        assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), out)
        assert all(torch.equal(model(x[i : i + 1])[0], out[i]) for i in range(3))
        assert model(x[:0]).shape == (0, 10)
    assert torch.equal(Engine(model, (2,), (17, 24))(x), out)


def test_features_of_every_stage(backend):
    model = tiny(out_indices=(0, 2, 4, 6))
    x = torch.randn(1, 3, 17, 24)
    with torch.inference_mode():
        expected = model(x)
        riformer_kernels.patch(model, backend=NAME, verify=False)
        for mine, theirs in zip(model(x), expected, strict=True):
            assert mine.stride() == theirs.stride() and (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_compiled_model_calls_these_ops(backend):
    model = tiny(num_classes=10)
    riformer_kernels.patch(model, backend=NAME, verify=False)
    x = torch.randn(2, 3, 17, 24)
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))


def test_the_unit_by_itself(backend, architecture):
    case = Block(64, (5, 5), BRAIN, form="unit", hidden=64)
    x, p = arguments_of(case)
    names = ("norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    found = riformer_kernels.norm_mlp(
        x, *(p[name] for name in names), layer_scale=p["layer_scale_2"], backend=NAME, return_moments=True
    )
    assert same(found, TARGET.block(x, p))
