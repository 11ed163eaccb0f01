"""Triton's kernels in its interpreter, as a target; choices that a test forces; and guards around what they allocate.

Triton decides at its import whether it interprets, so that these tests run in processes of their own
(`tests/gpu/test_triton.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from support_block import Block
from support_cases import all_pairs
from support_guards import GUARD
from support_target import Setting, Target
from torch.utils._python_dispatch import TorchDispatchMode

from riformer_kernels import ops
from riformer_kernels.backends import triton
from riformer_kernels.backends.triton import _launch

assert _launch.INTERPRETED, "these tests need TRITON_INTERPRET=1 from the start; run tests/gpu/test_triton.py"
POISON = 12345.0
# The interpreter's bfloat16 products are wrong. That dtype differs from float16 by no line of the kernels; a few cases
# run with the products put right.
FLOAT = (torch.float32, torch.float16)


class Guarded(TorchDispatchMode):
    """Every tensor that is allocated meanwhile lies between guard regions and holds NaN until written."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        if function is not torch.ops.aten.empty.memory_format or not out.numel():
            return out
        buffer = torch.full((out.numel() + 2 * GUARD,), POISON, dtype=out.dtype)
        inner = buffer.as_strided(out.shape, out.stride(), GUARD)
        inner.fill_(float("nan"))
        self.buffers.append((buffer, out.numel()))
        return inner

    def check(self) -> None:
        assert self.buffers
        for buffer, count in self.buffers:
            around = torch.cat((buffer[:GUARD], buffer[GUARD + count :]))
            assert (around == torch.tensor(POISON).to(buffer.dtype)).all(), "written outside of a tensor"


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    with Guarded() as mode:
        yield
    mode.check()


# 63 rows fill a tile of 64 but for one; 65 leave one for a second tile.
BLOCKS = (
    *all_pairs(
        Block, 12_000_000, channels=(8, 40, 96, 320), size=((9, 7), (13, 5)), dtype=FLOAT, norm=("gn", "ln"),
        form=("training", "unit"), residual=(True, False), layout=("nchw", "channels_last", "offset"), batch=(1, 3),
    ),
    Block(64, (17, 20), torch.float16, batch=1, layout="channels_last"),
    Block(192, (9, 7), torch.float16, "ln", batch=1, layout="transposed"),
    Block(24, (17, 20), layout="expanded"),
    Block(208, (3, 3), form="deployed", batch=1, layout="sliced"),
)  # fmt: skip

_SETTINGS = (Setting(),)
INTERPRETED = Target(
    "interpreted",
    {name: triton.launcher(name) for name in ops.ALL},
    settings=_SETTINGS,
    few=_SETTINGS,
    one=_SETTINGS,
    dtypes=FLOAT,
    most_work=26_000_000,
    grid={"block": BLOCKS},
    embeds_channels_last=True,
    guarded=guarded,
)
TARGETS = {"interpreted": INTERPRETED}
