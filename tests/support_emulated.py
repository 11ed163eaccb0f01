"""The CUDA kernels and their bindings on the emulator, as ops on CPU tensors: `torch.ops.riformer_emulated`.

The library is the one of `csrc/cuda`, compiled for the emulator (`csrc/emulator`). Importing this module builds it. The
tests that do run in processes of their own, side by side (`tests/gpu/test_cuda.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from support_block import Block
from support_cases import DTYPES, all_pairs
from support_head import Head
from support_native import build
from support_target import Setting, Target

from riformer_kernels import backends, ops
from riformer_kernels.dtypes import number_of
from riformer_kernels.ops._library import overloads, register

NAMESPACE = "riformer_emulated"
NAME = "emulated"
ARCHITECTURES = (80, 90)
OTHERS = (86, 120)  # 99 KB of shared memory; the kernels of sm_80


def _fake_embed(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As on a GPU, where tokens have their channels contiguous."""
    out, moments = ops.embed.fake(*arguments)
    return torch.empty(out.shape, dtype=out.dtype, device=out.device, memory_format=torch.channels_last), moments


_LIBRARY = build("emulated", "riformer_emulated", "-DRIFORMER_EMULATED=ON")
register(
    NAMESPACE, [dataclasses.replace(op, fake=_fake_embed) if op.name == "embed" else op for op in ops.ALL.values()]
)
torch.ops.load_library(str(_LIBRARY))
_C = ctypes.CDLL(str(_LIBRARY))
_C.riformer_cuda_choice.restype = ctypes.c_char_p
_C.riformer_cuda_choice.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_int] * 3
_C.riformer_cuda_set_seed.argtypes = [ctypes.c_uint64]

OPS = getattr(torch.ops, NAMESPACE)
BACKEND = dataclasses.replace(
    backends.cuda.BACKEND, name=NAME, automatic=False, devices=("cpu",), unusable=lambda: None, refuses=None,
    detail=lambda: "emulator", ops=overloads(NAMESPACE, ops.ALL),
)  # fmt: skip


def choice(case: Block, architecture: int, processors: int) -> str:
    """What `block` would run."""
    positions = case.size[0] * case.size[1]
    return _C.riformer_cuda_choice(
        case.batch, case.channels, case.width, positions, number_of(case.dtype), architecture, processors
    ).decode()


def seed(value: int) -> None:
    """Another order of everything that the emulator may order as it likes."""
    _C.riformer_cuda_set_seed(value)


FEW_PROCESSORS = 4  # two slots of rows are few for it, and three are many


@contextlib.contextmanager
def emulated(architecture: int = 90, processors: int = FEW_PROCESSORS) -> Iterator[None]:
    """The GPU that kernels run on meanwhile: its compute capability and its number of multiprocessors."""
    _C.riformer_cuda_set_device(architecture, processors)
    try:
        yield
    finally:
        _C.riformer_cuda_set_device(90, FEW_PROCESSORS)


# 63 rows fill a slot of 64 but for one; 65 leave one for a second slot; 49 put the rows of several images into a slot.
BLOCKS = all_pairs(
    Block, 4_000_000, channels=(16, 64, 96, 128, 192), size=((1, 1), (7, 7), (9, 7), (13, 5)), dtype=DTYPES,
    norm=("gn", "ln"), form=("training", "deployed", "unit"), residual=(True, False), hidden=(8, 64, 136, 256),
    layout=("nchw", "channels_last", "offset"), batch=(1, 3),
)  # fmt: skip

HEADS = tuple(Head(Block(320, (3, 3), dtype, norm, batch=12), 500) for dtype in DTYPES for norm in ("gn", "ln"))

# Whether the rows of a block are few or many for a GPU decides which kernels run. They are many where there is one
# multiprocessor, and few where there are 1000.
_DEVICES = tuple(
    Setting(
        f"sm_{architecture}-{'many' if processors == 1 else 'few'}_rows", partial(emulated, architecture, processors)
    )
    for architecture in ARCHITECTURES
    for processors in (1, 1000)
)
_ARCHITECTURES = tuple(Setting(f"sm_{number}", partial(emulated, number)) for number in ARCHITECTURES)
EMULATED = Target(
    NAME,
    {name: getattr(OPS, name) for name in ops.ALL},
    settings=_DEVICES,
    few=_ARCHITECTURES,
    one=_ARCHITECTURES[-1:],
    dtypes=BACKEND.dtypes,
    width=8,
    grid={"block": BLOCKS, "head": HEADS},
    embeds_channels_last=True,
)
TARGETS = {NAME: EMULATED}
