"""Paths of Triton's kernels that no case of the conformance suite takes, in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support_block import Block, block_parameters, check_block
from support_cases import tokens
from support_embed import DOWNSAMPLE, STEM, Embed, check_embed
from support_interpreted import INTERPRETED

from riformer_kernels.backends.triton import _launch, block, choice


@pytest.mark.parametrize(
    "case",
    [Block(64, (9, 7)), Block(40, (9, 7), norm="ln", residual=False), Block(208, (7, 7), batch=1, form="unit"),
     Block(96, (9, 7), parameters=torch.float32, residual=False)],
    ids=str,
)  # fmt: skip
def test_block_in_bfloat16(bfloat16_products, case):
    check_block(INTERPRETED.block, replace(case, dtype=torch.bfloat16, layout="channels_last"))


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
    check_block(INTERPRETED.block, case)


def test_embed_in_bfloat16(bfloat16_products):
    check_embed(INTERPRETED.embed, Embed(3, 16, **STEM, size=(33, 32), dtype=torch.bfloat16))
    check_embed(INTERPRETED.embed, Embed(16, 24, **DOWNSAMPLE, dtype=torch.bfloat16, layout="channels_last"))


def test_each_launch_makes_the_tensors_device_current():
    guard = _launch.on(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device) and guard.idx == 1


def test_tensors_elsewhere_are_refused(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    case = Block(16)
    with pytest.raises(Exception, match="serve cuda tensors, found one on cpu"):
        block.block(tokens(case, 0, 16), torch.zeros(3, 2, 16), *list(block_parameters(case, 0).values()))
