"""What every op promises on every target besides its numbers.

An image gives the same bits in any batch. A bad image spoils no other. Nothing is read or written outside of the
tensors. A batch may be empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support_block import Block, block_parameters
from support_cases import DTYPES, EPS, lay_out, per_norm, tokens
from support_compare import same
from support_conformance import served
from support_embed import DOWNSAMPLE, STEM, Embed, embed_parameters
from support_guards import surrounded
from support_head import head_parameters
from support_target import Target, chosen

# An image may fill one tile or several, or share a tile with other images. The hidden tensor may be in memory or not.
BLOCKS = tuple(
    replace(case, layout="channels_last")
    for case in (
        Block(16, (9, 7)),
        Block(16, (9, 7), hidden=40),
        Block(24, norm="ln"),
        Block(24, (9, 7), torch.bfloat16, "ln", hidden=40),
        Block(64, (13, 5), torch.bfloat16, hidden=64),
        Block(96, (9, 9), torch.float16),
        Block(96, (14, 14), torch.float16, hidden=384),
        Block(128, (7, 7), torch.float16, hidden=64),
        Block(208, (9, 7), hidden=64),
        Block(320, (14, 14), torch.bfloat16, "ln", hidden=64),
        Block(384, (5, 5), torch.bfloat16, hidden=64),
        Block(16, (9, 7), torch.bfloat16, int8=True),
        Block(24, (4, 3), torch.bfloat16, "ln", hidden=264, int8=True),
        Block(64, (9, 9), torch.float16, int8=True),
    )
)
EMBEDS = (
    Embed(3, 16, **STEM, size=(33, 32), batch=2),
    Embed(3, 96, **STEM, size=(9, 7), layout="channels_last", batch=2),
    Embed(3, 8, **STEM, size=(40, 41), dtype=torch.float16, layout="sliced", batch=2),
    Embed(3, 64, **STEM, size=(33, 32), dtype=torch.float16, images=torch.float32, parameters=torch.float32, batch=2),
    # 25 x 19: the second image does not start on a 16-byte boundary.
    Embed(3, 8, **STEM, size=(25, 19), batch=2),
    Embed(3, 8, **STEM, size=(25, 19), dtype=torch.bfloat16),
    Embed(16, 24, **DOWNSAMPLE, size=(9, 7), layout="channels_last"),
    Embed(16, 24, **DOWNSAMPLE, size=(17, 20), layout="channels_last", batch=2),
    Embed(24, 40, **DOWNSAMPLE, size=(9, 7), layout="channels_last", weight_layout="channels_last", batch=2),
)


def per_target(which: str, cases: Iterable[Any] = ()) -> pytest.MarkDecorator:
    """Parametrizes with every target, its settings of this kind, and the cases that it serves."""
    cases = tuple(cases)
    rows = [
        pytest.param(
            (target, setting), *([case] if cases else []), marks=target.marks,
            id="-".join(filter(None, (str(target), setting.name, str(case) if cases else ""))),
        )
        for target in chosen() for case in cases or [None] if case is None or served(target, case)
        for setting in getattr(target, which)
    ]  # fmt: skip
    return pytest.mark.parametrize(("target", "case") if cases else ("target",), rows, indirect=["target"])


per_block = per_target("few", BLOCKS)
per_embed = per_target("one", EMBEDS)
per_setting = per_target("one")


def arguments_of(case: Block) -> tuple[torch.Tensor, dict[str, Any]]:
    return tokens(case, 0, case.channels), block_parameters(case, 0)


def embed_arguments(case: Embed) -> tuple[torch.Tensor, dict[str, Any]]:
    return tokens(case, 0, case.in_channels), embed_parameters(case, 0)


def half(target: Target) -> torch.dtype:
    """A dtype of two bytes that ``target`` serves."""
    return torch.bfloat16 if torch.bfloat16 in target.dtypes else torch.float16


# --------------------------------------------------------------------------------------------------------------- bits


@per_block
def test_an_image_gives_the_same_bits_again_and_alone(target, case):
    x, parameters = arguments_of(case)
    out, found = target.block(x, parameters)
    assert same(target.block(x, parameters), (out, found)), "again"
    for index in range(x.shape[0]):
        alone = target.block(x[index : index + 1], parameters)
        assert same(alone, (out[index : index + 1], found[index : index + 1])), index


@per_embed
def test_an_embedded_image_gives_the_same_bits_alone(target, case):
    x, parameters = embed_arguments(case)
    out, found = target.embed(x, parameters, case.dtype)
    for index in range(x.shape[0]):
        alone = target.embed(x[index : index + 1], parameters, case.dtype)
        assert same(alone, (out[index : index + 1], found[index : index + 1])), index


@per_setting
@per_norm
def test_a_normed_and_classified_image_gives_the_same_bits_alone(target, norm):
    flag, dtype = norm == "ln", half(target)
    x, weights = tokens(Block(24, (13, 5), dtype, norm), 0, 24), head_parameters(24, 33, dtype, 0)
    normed, scores = target.norm(x, *weights[:2], EPS, flag), target.head(x, weights, flag)
    for index in range(3):
        one = x[index : index + 1]
        assert torch.equal(target.norm(one, *weights[:2], EPS, flag)[0], normed[index])
        assert torch.equal(target.head(one, weights, flag)[0], scores[index])


@per_block
def test_in_place_gives_the_bits_of_out_of_place(target, case):
    x, parameters = arguments_of(case)
    assert same(target.block_(x, parameters), target.block(x, parameters))


@per_target("one", [Block(24, (7, 5), dtype, hidden=40) for dtype in (torch.float32, torch.bfloat16)])
def test_layouts_of_parameters_give_the_same_bits(target, case):
    x, parameters = arguments_of(case)
    expected = target.block(x, parameters)
    for layout in ("channels_last", "transposed", "strided", "offset"):
        changed = {key: lay_out(parameters[key], layout) for key in ("fc1_weight", "fc2_weight")}
        assert same(target.block(x, parameters | changed), expected), layout
    spread = {
        k: v.repeat_interleave(2)[::2] for k, v in parameters.items() if isinstance(v, torch.Tensor) and v.dim() == 1
    }
    assert torch.equal(target.block(x, parameters | spread)[0], expected[0])


@per_target("one", [Block(24, (7, 5), dtype, hidden=40) for dtype in (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded", "offset"])
def test_layouts_of_tokens_give_the_same_bits(target, case, layout):
    x, parameters = arguments_of(case)
    x = lay_out(x, layout)
    expected = target.block(x.contiguous(memory_format=torch.channels_last), parameters)
    found = target.block(x, parameters)
    assert same(found, expected)
    assert found[0].is_contiguous()


# -------------------------------------------------------------------------------------------------- isolation, guards


@per_block
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_image_poisons_itself_alone(target, case, value):
    x, parameters = arguments_of(case)
    expected, _ = target.block(x, parameters)
    x[1, -1, -1, -1] = value
    out, _ = target.block(x, parameters)
    assert torch.equal(out[::2], expected[::2])
    bad = out[1].isnan()
    assert bad[:, -1, -1].all() if case.norm == "ln" else bad.all()


@per_setting
@per_norm
def test_a_bad_image_poisons_its_own_scores_alone(target, norm):
    flag = norm == "ln"
    x, weights = tokens(Block(16), 0, 16), head_parameters(16, 10, torch.float32, 0)
    expected = target.head(x, weights, flag)
    x[1, 0, 0, 0] = float("nan")
    scores = target.head(x, weights, flag)
    assert torch.equal(scores[::2], expected[::2]) and scores[1].isnan().all()


@per_target("few", [*BLOCKS, Block(320, (5, 5), batch=1, norm="ln", layout="channels_last")])
def test_a_block_stays_inside_its_tensors_and_writes_all_of_them(target, case):
    x, parameters = arguments_of(case)
    expected = target.block(x, parameters)
    around = {key: surrounded(value) for key, value in parameters.items()}
    inner = surrounded(x)
    with target.guarded():
        found = target.block(inner, around)
    assert same(found, expected) and torch.equal(inner, x)


@per_embed
def test_an_embedding_stays_inside_its_tensors_and_writes_all_of_them(target, case):
    x, parameters = embed_arguments(case)
    expected = target.embed(x, parameters, case.dtype)
    around = {key: surrounded(value) for key, value in parameters.items()}
    dense = case.layout in ("nchw", "channels_last")
    with target.guarded():
        found = target.embed(surrounded(x) if dense else x, around, case.dtype)
    assert same(found, expected)


@per_setting
@per_norm
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float", "half"])
def test_norm_and_head_stay_inside_their_tensors_and_write_all_of_them(target, norm, dtype):
    flag, dtype = norm == "ln", torch.float32 if dtype == torch.float32 else half(target)
    x = tokens(Block(40, (9, 7), dtype, norm, layout="channels_last"), 0, 40)
    weights = head_parameters(40, 33, dtype, 0)
    expected = target.norm(x, *weights[:2], EPS, flag), target.head(x, weights, flag)
    around = [surrounded(weight) for weight in weights]
    with target.guarded():
        found = target.norm(surrounded(x), *around[:2], EPS, flag), target.head(surrounded(x), around, flag)
    assert same(found, expected)


@per_setting
@per_norm
def test_empty_batch(target, norm):
    out, found = target.block(torch.empty(0, 16, 9, 7), block_parameters(Block(16, norm=norm, batch=0), 0))
    assert out.shape == (0, 16, 9, 7) and found.shape == (0, 2, 0 if norm == "ln" else 16)
    out, found = target.embed(torch.empty(0, 3, 17, 20), embed_parameters(Embed(batch=0), 0), torch.float32)
    assert out.shape == (0, 16, 9, 10) and found.shape == (0, 2, 16)
    weights = head_parameters(16, 10, torch.float32, 0)
    assert target.head(torch.empty(0, 16, 2, 2), weights, norm == "ln").shape == (0, 10)
    assert target.norm(torch.empty(0, 16, 2, 2), *weights[:2], EPS, norm == "ln").shape == (0, 16, 2, 2)
