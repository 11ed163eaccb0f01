"""The CUDA kernels as nvcc compiles them: the PTX of every kernel for sm_80 and sm_90a is interpreted, and its results
judged by the error-ratio rule. See `tests/support_ptx` for the interpreter, and for what it does not model.

The cases are the smallest that meet every kernel with every dtype. Rows end with a tail: 63 rows fill a slot of 64 but
for one, and two images of 35 rows share slots.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest
import support_cases
import support_head
import torch
from support_block import OPTIONAL, Block, block_parameters
from support_cases import DTYPES, tokens
from support_conformance import Head, Moments, Norm, check_op
from support_embed import DOWNSAMPLE, STEM, Embed
from support_ptx_build import NO_NVCC
from support_ptx_cuda import PTX_CUDA as TARGET
from support_ptx_cuda import calling, host, on

from riformer_kernels.dtypes import name_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason=NO_NVCC),
]
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
HALF = (BFLOAT16, FLOAT16)
# Multiprocessors: with one the rows are many, with a thousand they are few; that decides which kernels run.
MANY, FEW = 1, 1000


@pytest.fixture(autouse=True)
def _few_values(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A third of the values that other tests pool: here each costs a hundred thousand times what it costs a GPU."""
    monkeypatch.setattr(support_cases, "POOLED", 4000)
    monkeypatch.setattr(support_head, "POOLED", 1500)


@dataclass(frozen=True)
class Case:
    """A call of ``op`` on a GPU: its architecture, multiprocessors, and what else `support_ptx_cuda.Gpu` has."""

    op: str
    case: Any
    architecture: int = 90
    processors: int = MANY
    others: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        others = "".join(f"-{name}{value}" for name, value in self.others.items())
        return f"{self.op}-sm_{self.architecture}-{self.processors}{others}-{self.case}"

    def check(self) -> None:
        with on(architecture=self.architecture, processors=self.processors, **self.others):
            check_op(TARGET, self.op, self.case)


def blocks(architecture: int, processors: int, channels: int, hidden: int) -> list[Case]:
    """Slots that end with their image, slots that cross images, and LayerNorm, each in both dtypes of 16 bits."""
    found = []
    for dtype in HALF:
        turn = dtype == BFLOAT16
        found += [
            Block(channels, (9, 7), dtype, batch=1, hidden=hidden, residual=turn, form="training"),
            Block(channels, (5, 7), dtype, batch=2, hidden=hidden, residual=not turn, form="deployed"),
            Block(channels, (5, 7), dtype, "ln", batch=2, hidden=hidden, form="training" if turn else "unit"),
        ]
    return [Case("block", case, architecture, processors) for case in found]


BLOCKS = [
    # sm_80: fused, pairs with small, large and wide tiles; the last tile of hidden channels is not full.
    *blocks(80, MANY, 64, 128), *blocks(80, MANY, 96, 64), *blocks(80, MANY, 128, 48), *blocks(80, MANY, 192, 64),
    *blocks(80, FEW, 64, 72), *blocks(80, MANY, 40, 136), *blocks(80, MANY, 320, 72),
    # sm_90: fused alone and in clusters, pairs with narrow and wide tiles.
    *blocks(90, MANY, 64, 128), *blocks(90, MANY, 96, 128), *blocks(90, MANY, 128, 192), *blocks(90, MANY, 192, 128),
    *blocks(90, MANY, 320, 192), *blocks(90, MANY, 384, 128),
    *blocks(90, FEW, 64, 128), *blocks(90, MANY, 256, 128),
    *(Case("block", Block(64, size, norm=norm, batch=2, hidden=72), 80)
      for size, norm in (((9, 7), "gn"), ((5, 7), "gn"), ((5, 7), "ln"))),
]  # fmt: skip


# What the block's case does not have by itself, each on both architectures.
SPECIAL = [
    Case("block", case, architecture, MANY, others)
    for architecture in (80, 90)
    for case, others in (
        (Block(64, (5, 7), BFLOAT16, batch=1, hidden=64, absent=OPTIONAL), {}),
        (Block(64, (5, 7), BFLOAT16, batch=1, hidden=64, parameters=FLOAT32), {}),
        (Block(64, (1, 1), FLOAT16, batch=65, hidden=64, form="deployed"), {}),
        (Block(64, (13, 5), BFLOAT16, batch=1, hidden=64), {"offset": 16}),
        (Block(64, (9, 7), BFLOAT16, batch=1, hidden=64, values="mean1000", residual=False), {}),
    )
] + [Case("block_", Block(64, (9, 7), dtype, hidden=64, layout="channels_last", batch=1), architecture)
     for architecture, dtype in ((80, FLOAT16), (90, BFLOAT16))]  # fmt: skip
EMBEDS = [
    Case("embed", case, processors=processors)
    for processors, cases in (
        (FEW, (
            *(Embed(3, 16, **STEM, size=(33, 32), dtype=dtype, batch=1) for dtype in DTYPES),
            *(Embed(16, 24, **DOWNSAMPLE, size=(17, 15), dtype=dtype, batch=2) for dtype in DTYPES),
            Embed(15, 24, **DOWNSAMPLE, size=(9, 7), dtype=BFLOAT16, bias=False),
        )),
        (MANY, (
            Embed(3, 64, **STEM, size=(33, 32), dtype=BFLOAT16, images=FLOAT32, batch=1),
            Embed(3, 64, **STEM, size=(32, 33), dtype=FLOAT16, layout="channels_last", batch=1),
            *(Embed(3, 96, **STEM, size=(17, 20), dtype=dtype, batch=3) for dtype in HALF),
            *(Embed(24, 96, **DOWNSAMPLE, size=(9, 13), dtype=dtype, layout="channels_last", batch=2)
              for dtype in HALF),
            *(Embed(24, 128, **DOWNSAMPLE, size=(9, 13), dtype=dtype, layout="channels_last", batch=2)
              for dtype in HALF),
        )),
    )
    for case in cases
]  # fmt: skip
# Rows in 8 lanes, in 32 lanes, and those that do not fit into the registers of 32 lanes.
WIDTHS = {"narrow": {2: 40, 4: 40}, "wide": {2: 328, 4: 168}, "any": {2: 1544, 4: 776}}
ROWS = [
    Case(op, make(Block(widths[dtype.itemsize], (2, 5), dtype, "ln", batch=2)))
    for dtype in DTYPES for widths in WIDTHS.values() for op, make in (("norm", Norm),)
] + [Case("norm", Norm(Block(40, (5, 7), dtype, batch=2), FLOAT32)) for dtype in DTYPES]  # fmt: skip
# The statistics of positions that the block itself takes.
ROWS += [
    Case("block", Block(WIDTHS[form][dtype.itemsize], size, dtype, "ln", batch=1, hidden=8), 80)
    for form, size, dtypes in (("wide", (7, 5), (FLOAT32,)), ("any", (3, 3), DTYPES)) for dtype in dtypes
]  # fmt: skip
HEADS = [
    Case("head", Head(Block(channels, (3, 3), dtype, norm, batch=batch), classes))
    for dtype in DTYPES
    for channels, norm, batch, classes in ((64, "gn", 12, 125), (328, "ln", 12, 125), (64, "ln", 6, 250))
]
MOMENTS = [Case("moments", Moments((2, 72, 9, 13), dtype, mean)) for dtype in DTYPES for mean in (0.0, 1000.0)]
CASES = [*BLOCKS, *SPECIAL, *EMBEDS, *ROWS, *HEADS, *MOMENTS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ptx(case):
    case.check()
    assert host().ran


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("to", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_convert(dtype, to, offset):
    """Weights from one dtype to another, rounded to nearest even: the bits of PyTorch's own conversion."""
    x = torch.randn(2061, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:6] = torch.tensor([0.0, -0.0, float("inf"), 65519.0, 1e-8, 3e38]).to(dtype)
    with calling() as call:
        at = call.put(x, offset * dtype.itemsize)
        out = call.room(len(x), to)
        call.run("convert", at, dtype, out, to, len(x))
        assert torch.equal(call.get(out, to, len(x)), x.to(to))


def test_an_image_that_is_nan_spoils_no_other():
    for architecture in (80, 90):
        case = Block(64, (5, 7), BFLOAT16, batch=3, hidden=64)
        x, p = tokens(case, 0, 64), block_parameters(case, 0)
        with on(architecture=architecture, processors=MANY):
            expected, _ = TARGET.block(x, p)
            x[1, 3, 2, 2] = float("nan")
            found, _ = TARGET.block(x, p)
        assert found[1].isnan().all() and torch.equal(found[::2], expected[::2])


def test_every_kernel_ran(request):
    """Whoever adds a kernel, or another instance of one, finds here that no case runs its PTX."""
    mine = [item for item in request.session.items if item.fspath == request.node.fspath]
    if len(mine) < len(CASES) + 18:
        pytest.skip("only some tests of this file were chosen")
    missing = sorted(set(host().modules) - host().used)
    assert not missing, missing
