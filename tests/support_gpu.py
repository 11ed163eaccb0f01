"""The kernels of both GPU backends on a GPU, as targets."""

from __future__ import annotations

import pytest
import torch
from support_block import Block
from support_cases import DTYPES, all_pairs
from support_embed import DOWNSAMPLE, STEM, Embed
from support_head import Head
from support_target import Target

from riformer_kernels import backends, ops

REASONS = {name: backends.ALL[name].unusable() for name in ("triton", "cuda")}
NOWHERE = f"no GPU to run on: {'; '.join(f'{name}: {reason}' for name, reason in REASONS.items())}"
GPU_MARKS = (pytest.mark.gpu, pytest.mark.skipif(all(REASONS.values()), reason=NOWHERE))

BLOCKS = all_pairs(
    Block, 200_000_000, channels=(8, 40, 64, 96, 128, 192, 320, 384, 512),
    size=((1, 1), (7, 7), (14, 14), (17, 20), (28, 28)), dtype=DTYPES, norm=("gn", "ln"), form=("training", "unit"),
    residual=(True, False), layout=("nchw", "channels_last", "offset"), batch=(1, 3),
)  # fmt: skip
IN_PLACE = tuple(
    Block(96, (9, 7), dtype, norm, layout=layout)
    for dtype in DTYPES for norm in ("gn", "ln") for layout in ("nchw", "channels_last")
)  # fmt: skip
EMBEDS = tuple(
    embed
    for dtype in DTYPES
    for embed in (
        Embed(3, 64, **STEM, size=(225, 193), dtype=dtype),
        Embed(64, 128, **DOWNSAMPLE, size=(28, 27), layout="channels_last", dtype=dtype),
        Embed(128, 320, **DOWNSAMPLE, size=(9, 7), dtype=dtype),
        Embed(15, 24, **DOWNSAMPLE, bias=False, dtype=dtype),
    )
)
HEADS = tuple(Head(Block(512, (7, 7), dtype, norm, batch=12), 1000) for dtype in DTYPES for norm in ("gn", "ln"))


def _target(name: str, namespace: str) -> Target:
    return Target(
        name,
        {op: getattr(getattr(torch.ops, namespace), op) for op in ops.ALL},
        width=8 if name == "cuda" else 1,
        grid={"block": BLOCKS, "block_": IN_PLACE, "embed": EMBEDS, "head": HEADS},
        device="cuda",
        embeds_channels_last=True,
        why_not=lambda: REASONS[name],
        marks=GPU_MARKS,
    )


TARGETS = {"triton": _target("triton", "riformer"), "cuda": _target("cuda", "riformer_cuda")}
