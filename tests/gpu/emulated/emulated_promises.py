"""What the CUDA kernels promise besides their numbers, on the emulator: bits, isolation of images, guards, and a model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import support_emulated
import torch
from riformer.model import RIFormer
from riformer.randomize import randomize_
from support_emulated import (  # noqa: F401
    ARCHITECTURES,
    DTYPES,
    NAME,
    OPS,
    architecture_fixture,
    choice,
    emulated,
    run_block,
    run_block_,
    run_embed,
    run_head,
    run_norm,
    seed,
    surrounded,
)
from support_ops import EPS, PARAMETERS, Block, block_parameters, check_ratios, one_thread, per_norm, tokens  # noqa: F401
from test_embed import DOWNSAMPLE, STEM, Embed, embed_parameters
from test_head import parameters_of

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


def same(found, expected) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


# -------------------------------------------------------------------------------------------------------------- bits


@per_case
def test_the_order_of_warps_and_copies_changes_no_bit(architecture, case):
    x, parameters = arguments_of(case)
    expected = run_block(x, parameters)
    for value in range(1, 5):
        seed(value)
        assert same(run_block(x, parameters), expected), f"seed {value}"


@per_embed
def test_nor_does_it_in_an_embedding(case):
    x, parameters = tokens(case, 0, case.in_channels), embed_parameters(case, 0)
    expected = run_embed(x, parameters, case.dtype)
    for value in range(1, 4):
        seed(value)
        assert same(run_embed(x, parameters, case.dtype), expected), f"seed {value}"


@per_case
def test_an_image_gives_the_same_bits_alone_and_in_a_batch(architecture, case):
    x, parameters = arguments_of(case)
    out, found = run_block(x, parameters)
    for index in range(x.shape[0]):
        alone = run_block(x[index : index + 1], parameters)
        assert same(alone, (out[index : index + 1], found[index : index + 1])), index


@per_embed
def test_so_does_one_that_is_embedded(case):
    x, parameters = tokens(case, 0, case.in_channels), embed_parameters(case, 0)
    out, found = run_embed(x, parameters, case.dtype)
    for index in range(x.shape[0]):
        alone = run_embed(x[index : index + 1], parameters, case.dtype)
        assert same(alone, (out[index : index + 1], found[index : index + 1])), index


@per_norm
def test_so_does_one_that_is_normed_and_classified(norm):
    flag = norm == "ln"
    case = Block(24, (13, 5), BRAIN, norm)
    x, weights = tokens(case, 0, 24), parameters_of(24, 33, BRAIN, 0)
    normed, scores = run_norm(x, *weights[:2], EPS, flag), run_head(x, weights, flag)
    for index in range(3):
        one = x[index : index + 1]
        assert torch.equal(run_norm(one, *weights[:2], EPS, flag)[0], normed[index])
        assert torch.equal(run_head(one, weights, flag)[0], scores[index])


@per_case
def test_in_place_gives_the_bits_of_out_of_place(architecture, case):
    x, parameters = arguments_of(case)
    assert same(run_block_(x, parameters), run_block(x, parameters))


@pytest.mark.parametrize("layout", ["nchw", "sliced", "offset"])
def test_in_place_where_the_kernels_cannot_write(layout):
    """They work on a copy, which is copied back, moments too."""
    case = Block(16, (5, 7), hidden=40, layout=layout)
    x, parameters = arguments_of(case)
    expected = run_block(x, parameters)
    statistics = torch.empty(3, 4, 16)[:, ::2]
    statistics.copy_(OPS.moments(x))
    OPS.block_(x, statistics, *(parameters[name] for name in PARAMETERS))
    assert same((x, statistics), expected)


@per_case
def test_each_form_of_a_block_gives_the_same_bits(architecture, case):
    """How many multiprocessors there are, and how many rows for them, decides between one kernel and two, in tiles for
    many rows or for few. A GPU with one has always many rows, one with 1000 has always few."""
    x, parameters = arguments_of(case)
    expected = run_block(x, parameters)
    for processors in (1, 1000):
        with emulated(architecture, processors):
            assert same(run_block(x, parameters), expected), processors


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


# ------------------------------------------------------------------------------------------------- isolation, guards


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@per_case
def test_a_bad_image_poisons_itself_alone(architecture, case, value):
    x, parameters = arguments_of(case)
    expected, _ = run_block(x, parameters)
    x[1, -1, -1, -1] = value
    out, _ = run_block(x, parameters)
    assert torch.equal(out[::2], expected[::2])
    bad = out[1].isnan()
    assert bad[:, -1, -1].all() if case.norm == "ln" else bad.all()


@per_norm
def test_a_bad_image_poisons_its_own_scores_alone(norm):
    flag = norm == "ln"
    x, weights = tokens(Block(16), 0, 16), parameters_of(16, 10, torch.float32, 0)
    expected = run_head(x, weights, flag)
    x[1, 0, 0, 0] = float("nan")
    scores = run_head(x, weights, flag)
    assert torch.equal(scores[::2], expected[::2]) and scores[1].isnan().all()


@per_case
def test_nothing_beside_the_arguments_is_used(architecture, case):
    """Arguments between NaN. Results and workspaces lie between guards of the bindings in every test."""
    x, parameters = arguments_of(case)
    around = {key: surrounded(value) for key, value in parameters.items()}
    assert same(run_block(surrounded(x), around), run_block(x, parameters))


@per_embed
def test_nothing_beside_an_embedding_is_used(case):
    x, parameters = tokens(case, 0, case.in_channels), embed_parameters(case, 0)
    around = {key: surrounded(value) for key, value in parameters.items()}
    assert same(run_embed(surrounded(x), around, case.dtype), run_embed(x, parameters, case.dtype))


@per_norm
def test_nothing_beside_norm_and_head_is_used(norm):
    flag = norm == "ln"
    x, weights = tokens(Block(24, (13, 5), BRAIN, norm), 0, 24), parameters_of(24, 33, BRAIN, 0)
    around = [surrounded(weight) for weight in weights]
    assert torch.equal(run_norm(surrounded(x), *around[:2], EPS, flag), run_norm(x, *weights[:2], EPS, flag))
    assert torch.equal(run_head(surrounded(x), around, flag), run_head(x, weights, flag))


@per_norm
def test_empty_batch(norm):
    out, found = run_block(torch.empty(0, 16, 9, 7), block_parameters(Block(16, norm=norm, batch=0), 0))
    assert out.shape == (0, 16, 9, 7) and found.shape == (0, 2, 0 if norm == "ln" else 16)
    out, found = run_embed(torch.empty(0, 3, 17, 20), embed_parameters(Embed(batch=0), 0), torch.float32)
    assert out.shape == (0, 16, 9, 10) and found.shape == (0, 2, 16)
    weights = parameters_of(16, 10, torch.float32, 0)
    assert run_head(torch.empty(0, 16, 2, 2), weights, norm == "ln").shape == (0, 10)
    assert run_norm(torch.empty(0, 16, 2, 2), *weights[:2], EPS, norm == "ln").shape == (0, 16, 2, 2)


# ------------------------------------------------------------------------------------------------------------- models

TINY = {"layers": [1, 1, 2, 1], "embed_dims": [16, 24, 40, 200]}


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setitem(backends.ALL, NAME, support_emulated.BACKEND)


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
    block = support_emulated.BACKEND.block
    broken = replace(
        support_emulated.BACKEND,
        block=lambda *arguments: block(*arguments[:10], 0.1, *arguments[11:]),  # eps2
    )
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
    assert same(found, run_block(x, p))
