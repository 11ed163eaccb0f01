"""The Triton kernels as Triton's compiler emits them: the PTX of every kernel for sm_80 and sm_90 is interpreted, and
its results judged by the error-ratio rule. What the compiler makes of them besides is in `test_triton_ahead.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import support_cases
import support_head
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

from support_block import OPTIONAL, Block
from support_cases import DTYPES
from support_conformance import Head, Moments, Norm, check_op
from support_embed import DOWNSAMPLE, STEM, Embed
from support_ptx_triton import PTX_TRITON as TARGET
from support_ptx_triton import on, used
from triton.runtime.jit import JITFunction

from riformer_kernels.backends.triton import block, block_maps, embed, head, moments, norm

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
HALF = (BFLOAT16, FLOAT16)
ARCHITECTURES = (80, 90)
TOKENS = {BFLOAT16: "*bf16", FLOAT16: "*fp16", FLOAT32: "*fp32"}


@pytest.fixture(autouse=True)
def _few_values(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A third of the values that other tests pool: here each costs a hundred thousand times what it costs a GPU."""
    monkeypatch.setattr(support_cases, "POOLED", 4000)
    monkeypatch.setattr(support_head, "POOLED", 1500)


@dataclass(frozen=True)
class Case:
    op: str
    case: Any
    architecture: int

    def __str__(self) -> str:
        return f"{self.op}-sm_{self.architecture}-{self.case}"

    def check(self) -> None:
        with on(self.architecture):
            check_op(TARGET, self.op, self.case)


# Rows end with a tail, and so do hidden channels; 40 channels do not fill the tile that they are padded to.
FUSED = (
    Block(64, (9, 7), BFLOAT16, batch=1),
    Block(96, (5, 7), FLOAT16, "ln", batch=2, hidden=72),
    Block(128, (5, 7), BFLOAT16, batch=1, hidden=136, residual=False, form="deployed"),
    Block(192, (5, 7), FLOAT16, batch=1, hidden=64, form="unit"),
    Block(40, (9, 7), FLOAT16, batch=2, hidden=72, absent=OPTIONAL),
    Block(40, (5, 7), BFLOAT16, "ln", batch=2, hidden=72, parameters=FLOAT32),
    Block(64, (5, 7), FLOAT32, batch=2, hidden=72),
)
PAIRS = (
    Block(320, (9, 7), BFLOAT16, batch=1, hidden=136),
    Block(320, (5, 7), FLOAT16, batch=1, hidden=128, residual=False),
    Block(512, (3, 3), FLOAT16, "ln", batch=2, hidden=128, form="deployed"),
    Block(320, (5, 7), BFLOAT16, "ln", batch=1, hidden=72),
    Block(208, (5, 7), FLOAT32, batch=1, hidden=72),
)
OTHERS = (
    ("embed", Embed(3, 64, **STEM, size=(33, 32), dtype=BFLOAT16, images=FLOAT32, batch=1)),
    ("embed", Embed(64, 128, **DOWNSAMPLE, size=(9, 13), dtype=BFLOAT16, layout="channels_last", batch=1)),
    ("embed", Embed(16, 24, **DOWNSAMPLE, size=(17, 15), dtype=FLOAT16, layout="channels_last", batch=2)),
    ("embed", Embed(15, 24, **DOWNSAMPLE, size=(9, 7), dtype=FLOAT32, bias=False)),
    *(("norm", Norm(Block(channels, (5, 7), dtype, norm, batch=2), out))
      for channels, dtype, norm, out in (
          (40, BFLOAT16, "gn", FLOAT32), (320, FLOAT16, "ln", None), (64, FLOAT32, "gn", None))),
    *(("head", Head(Block(channels, (3, 3), dtype, norm, batch=12), 125))
      for channels, dtype, norm in ((64, BFLOAT16, "gn"), (40, FLOAT16, "ln"), (64, FLOAT32, "ln"))),
    *(("moments", Moments((2, 72, 9, 13), dtype, mean))
      for dtype, mean in ((BFLOAT16, 0.0), (FLOAT16, 0.0), (FLOAT32, 1000.0))),
    ("block_", Block(64, (9, 7), BFLOAT16, layout="channels_last", batch=1)),
)  # fmt: skip
CASES = [
    Case(op, case, architecture)
    for architecture in ARCHITECTURES
    for op, case in (*(("block", case) for case in (*FUSED, *PAIRS)), *OTHERS)
]
# Every kernel of the backend runs on both architectures, and those that see tokens with all their dtypes.
MODULES = (block, block_maps, embed, head, moments, norm)
KERNELS = {
    name.strip("_") for module in MODULES for name, value in vars(module).items() if isinstance(value, JITFunction)
}
WITH_TOKENS = ("fused_kernel", "expand_kernel", "project_kernel", "conv_kernel", "norm_kernel", "tile_kernel")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ptx(case):
    case.check()


def test_every_kernel_ran(request):
    mine = [item for item in request.session.items if item.fspath == request.node.fspath]
    if len(mine) <= len(CASES):
        pytest.skip("only some tests of this file were chosen")
    kernels = {name for name in KERNELS if name.endswith("_kernel")}
    everywhere = {(name, architecture) for name in kernels for architecture in ARCHITECTURES}
    assert everywhere <= {(name, architecture) for name, architecture, _ in used}, everywhere
    wanted = {(*pair, TOKENS[dtype]) for pair in everywhere if pair[0] in WITH_TOKENS for dtype in DTYPES}
    assert wanted <= used, wanted - used
