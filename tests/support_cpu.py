"""The CPU's kernels as a target, and which of their instruction sets a test runs on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support_block import OPTIONAL, Block
from support_cases import DTYPES, LAYOUTS, all_pairs
from support_target import Setting, Target, chosen

from riformer_kernels import ops
from riformer_kernels.backends import cpu

OPS = torch.ops.riformer
ISAS: tuple[str, ...] = tuple(cpu.isa_status()["supported"])
# An instruction set that the machine lacks is not in the grid; `test_moments.py` skips once for each, by name.
per_isa = pytest.mark.parametrize("isa", ISAS or ("none",), indirect=True)


def need_native() -> None:
    """Without the native library: a failure, unless RIFORMER_CPU=off asked for it. Modules call it too."""
    reason = cpu.unusable()
    if reason and os.environ.get("RIFORMER_CPU") == "off":
        pytest.skip(f"RIFORMER_CPU=off: {reason}", allow_module_level=True)
    assert reason is None, f"the native library is not usable: {reason}"


def bindings() -> Any:
    """The ops as C++ binds them: the CPU's, or with ``--target=emulated`` those of the CUDA kernels on the emulator."""
    if any(target.name == "emulated" for target in chosen()):
        return torch.ops.riformer_emulated
    need_native()
    return OPS


@contextlib.contextmanager
def selected(isa: str) -> Iterator[str]:
    """The instruction set to use meanwhile."""
    need_native()
    before = cpu.isa_status()["chosen"]
    cpu.select_isa(isa)
    try:
        yield isa
    finally:
        cpu.select_isa(before)


SIZES = ((1, 1), (5, 5), (7, 7), (9, 7), (14, 14), (17, 20), (28, 28))
BLOCKS = all_pairs(
    Block, 60_000_000, channels=(8, 16, 24, 64, 96, 128, 320, 512), size=SIZES, dtype=DTYPES, norm=("gn", "ln"),
    form=("training", "deployed", "unit"), residual=(True, False), layout=LAYOUTS, batch=(1, 3, 5),
)  # fmt: skip

ONE_ABSENT = tuple(
    Block(24, (9, 7), dtype, norm, absent=absent)
    for dtype in (torch.float32, torch.bfloat16)
    for norm in ("gn", "ln")
    for absent in (*((name,) for name in OPTIONAL), OPTIONAL)
)

_SETTINGS = tuple(Setting(isa, partial(selected, isa)) for isa in ISAS or ("none",))
CPU = Target(
    "cpu",
    {name: getattr(OPS, name) for name in ops.ALL},
    settings=_SETTINGS,
    few=_SETTINGS,
    one=_SETTINGS,
    int8=True,
    most_work=60_000_000,
    grid={"block": (*BLOCKS, *ONE_ABSENT)},
)
TARGETS = {"cpu": CPU}
