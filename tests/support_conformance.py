"""The cases that every target has to pass, op by op.

`CASES` has an entry for every op of `riformer_kernels.ops.ALL`: a new op without cases fails the suite. A target adds
its own grid (`Target.grid`), and leaves out what it does not serve (`served`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from support_block import OPTIONAL, SEMANTICS, Block, check_block
from support_cases import DTYPES, described, draws, lay_out
from support_embed import DOWNSAMPLE, STEM, Embed, check_embed
from support_head import Head, check_head
from support_moments import check_moments
from support_norm import check_norm
from support_target import Setting, Target

NORMS = ("gn", "ln")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Norm:
    """A case of ``norm``: tokens as of a block, and the result's dtype."""

    tokens: Block = field(default_factory=Block)
    out: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.tokens} to {self.out}" if self.out else str(self.tokens)


@dataclass(frozen=True)
class Moments:
    """A case of ``moments``: tokens around ``mean``, in three layouts."""

    shape: tuple[int, int, int, int] = (3, 8, 9, 7)
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    seed: int = 0

    @property
    def channels(self) -> int:
        return self.shape[1]

    def __str__(self) -> str:
        return described(self) + f" {self.shape}"


# ----------------------------------------------------------------------------------------------------- cases of block

# The models' own blocks, at the sizes of their stages or near them.
STAGES = (
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
# The models' widths, with few hidden channels.
WIDE = tuple(
    Block(channels, size, dtype, norm, form, batch=2, hidden=hidden, layout="channels_last", residual=channels > 320)
    for channels, size, hidden in ((320, (5, 5), 64), (384, (7, 7), 40), (512, (3, 3), 64))
    for dtype, norm, form in (
        (torch.bfloat16, "gn", "training"), (torch.float16, "ln", "deployed"), (torch.float32, "gn", "unit"),
    )
)  # fmt: skip
SPECIAL = tuple(
    Block(channels, (9, 7), dtype, norm, values=values, residual=False, hidden=64)
    for dtype in DTYPES for norm in NORMS for values in ("small", "mean1000") for channels in (16, 64)
)  # fmt: skip
ABSENT = tuple(
    Block(channels, (5, 5), dtype, norm, absent=OPTIONAL, batch=1, hidden=hidden)
    for dtype in DTYPES for norm in NORMS for channels, hidden in ((24, None), (24, 40), (208, None), (208, 40))
)  # fmt: skip
# Golden takes the parameters as they are; eager has to round them to the tokens' dtype first.
OTHER_PARAMETERS = tuple(
    Block(40, (9, 7), dtype, norm, residual=False, parameters=parameters, hidden=72)
    for norm in NORMS for dtype in DTYPES for parameters in DTYPES
)  # fmt: skip
IN_PLACE = (
    Block(16),
    Block(16, norm="ln"),
    Block(16, layout="channels_last"),
    Block(16, dtype=torch.bfloat16, hidden=64),
    Block(16, (9, 7), torch.bfloat16, layout="offset", hidden=64),
    Block(96, (13, 5), torch.float16, layout="channels_last", hidden=40, batch=2),
    Block(320, (5, 5), layout="channels_last", batch=1),
    Block(384, (7, 7), torch.bfloat16, layout="channels_last", batch=2, hidden=40),
)

# ----------------------------------------------------------------------------------------------- cases of the other ops

EMBEDS = (
    Embed(3, 16, **STEM, size=(33, 32)),
    Embed(3, 96, **STEM, size=(9, 7), layout="channels_last", batch=1),
    Embed(3, 8, **STEM, size=(40, 41), dtype=torch.float16, layout="sliced"),
    Embed(3, 64, **STEM, size=(33, 32), dtype=torch.float16, images=torch.float32, parameters=torch.float32, batch=1),
    Embed(3, 64, **STEM, size=(33, 32), dtype=torch.bfloat16, images=torch.float32, parameters=torch.float32, batch=1),
    Embed(3, 64, **STEM, size=(33, 32), dtype=torch.float16, images=torch.bfloat16, batch=1),
    Embed(16, 24, **DOWNSAMPLE, size=(17, 20), layout="channels_last"),
    Embed(16, 24, **DOWNSAMPLE, size=(17, 20), layout="channels_last", dtype=torch.bfloat16),
    Embed(24, 40, **DOWNSAMPLE, size=(9, 7), layout="channels_last", weight_layout="channels_last"),
    Embed(96, 192, **DOWNSAMPLE, size=(9, 9), layout="channels_last", batch=1),
    Embed(96, 192, **DOWNSAMPLE, size=(9, 9), layout="channels_last", batch=1, dtype=torch.bfloat16),
    Embed(128, 320, **DOWNSAMPLE, size=(7, 7), layout="channels_last", batch=1, dtype=torch.float16),
    Embed(15, 24, **DOWNSAMPLE, size=(9, 7), bias=False),
    Embed(64, 320, **DOWNSAMPLE, size=(1, 1), batch=3),
    Embed(20, 40, (3, 5), 3, 0, size=(9, 13), layout="channels_last", weight_layout="strided"),
    Embed(16, 24, **DOWNSAMPLE, size=(9, 7), layout="expanded"),
)
NORM = (
    *(
        Norm(Block(channels, size, dtype, norm, layout="channels_last"))
        for dtype in DTYPES for norm in NORMS
        for channels, size in ((24, (9, 7)), (96, (17, 20)), (320, (5, 5)), (64, (1, 1)))
    ),
    *(Norm(Block(16, norm=norm, values=values)) for norm in NORMS for values in ("small", "mean1000")),
    *(Norm(Block(24, (5, 7), torch.bfloat16, norm, batch=12), out) for norm in NORMS for out in DTYPES),
)  # fmt: skip
HEADS = (
    *(
        Head(Block(channels, size, dtype, norm, batch=12), classes)
        for dtype in DTYPES for norm in NORMS
        for channels, size, classes in ((64, (7, 7), 100), (320, (3, 3), 1000))
    ),
    *(Head(Block(24, (5, 7), torch.bfloat16, norm, batch=12), 64, out) for norm in NORMS for out in DTYPES),
)  # fmt: skip
MOMENTS = tuple(
    Moments(shape, dtype, mean)
    for dtype in DTYPES
    for shape in ((3, 8, 9, 7), (1, 96, 17, 20), (2, 320, 1, 1), (1, 16, 48, 48), (1, 5, 48, 48))
    for mean in (0.0, 1000.0)
)

# For each op, its cases in groups, and which of a target's settings each group runs with (a field of `Target`).
CASES: dict[str, tuple[tuple[str, tuple], ...]] = {
    "moments": (("one", MOMENTS),),
    "embed": (("one", EMBEDS),),
    "block": (
        ("one", SEMANTICS),
        ("few", (*ABSENT, *OTHER_PARAMETERS)),
        ("settings", (*STAGES, *WIDE, *SPECIAL)),
    ),
    "block_": (("few", IN_PLACE),),
    "norm": (("one", NORM),),
    "head": (("one", HEADS),),
}
# Which settings the cases of a target's own grid run with.
GRID_SETTINGS = {"block": "settings", "block_": "few", "embed": "one", "head": "one"}


def served(target: Target, case: Any) -> bool:
    """Whether ``target`` takes this case: its dtypes, its widths, and no more work than there is time for."""
    if isinstance(case, Norm | Head):
        case = case.tokens
    elif isinstance(case, Moments):
        return case.channels % target.width == 0
    elif case.work > target.most_work or (isinstance(case, Block) and case.int8 and not target.int8):
        return False
    return case.dtype in target.dtypes and case.channels % target.width == 0


def cases_of(target: Target, op: str) -> Iterator[tuple[Setting, Any]]:
    """Every case of ``op`` that ``target`` serves, with every setting that it is to run with, none of them twice."""
    groups = [(which, [case for case in cases if served(target, case)]) for which, cases in CASES[op]]
    if op in target.grid:
        groups.append((GRID_SETTINGS[op], list(target.grid[op])))
    seen = set()
    for which, cases in groups:
        for case in cases:
            for setting in getattr(target, which):
                if (setting.name, case) not in seen:
                    seen.add((setting.name, case))
                    yield setting, case


# ----------------------------------------------------------------------------------------------------------- checks


def _moments(target: Target, case: Moments, label: str) -> None:
    x = (case.mean + draws(case.seed, torch.float32)(*case.shape)).to(case.dtype)
    for layout in ("nchw", "channels_last", "sliced"):
        check_moments(target.moments(lay_out(x, layout)), x, f"{label}: {case} {layout}")


def _block_in_place(target: Target, case: Block, label: str) -> None:
    """By the rule, and the bits of the op that writes to new memory."""

    def run(x: torch.Tensor, parameters: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        found, expected = target.block_(x, parameters), target.block(x, parameters)
        assert all(map(torch.equal, found, expected)), f"{label}: {case}: other bits than out of place"
        return found

    check_block(run, case, label)


CHECKS: dict[str, Callable[[Target, Any, str], object]] = {
    "moments": _moments,
    "embed": lambda target, case, label: check_embed(target.embed, case, label),
    "block": lambda target, case, label: check_block(target.block, case, label),
    "block_": _block_in_place,
    "norm": lambda target, case, label: check_norm(target.norm, case.tokens, label, case.out),
    "head": lambda target, case, label: check_head(target.head, case.tokens, case.classes, label, case.out),
}


def check_op(target: Target, op: str, case: Any) -> None:
    CHECKS[op](target, case, str(target))
