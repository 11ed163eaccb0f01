"""What the emulated tests share: the CUDA kernels and their bindings as ops on CPU tensors, `torch.ops.riformer_emulated`.

The library is the one of `csrc/cuda`, compiled for the emulator (`csrc/emulator`). The files here run in processes of
their own, side by side (`tests/test_cuda.py`); their names keep them out of an ordinary run.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import support_ops
import torch
from support_native import build
from support_ops import EPS, PARAMETERS, Block

from riformer_kernels import backends, ops
from riformer_kernels.ops._library import overloads, register

NAMESPACE = "riformer_emulated"
NAME = "emulated"
ARCHITECTURES = (80, 90)
OTHERS = (86, 120)  # 99 KB of shared memory; the kernels of sm_80
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/common/dtypes.h


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
        case.batch, case.channels, case.width, positions, DTYPES[case.dtype], architecture, processors
    ).decode()


def seed(value: int) -> None:
    """Another order of everything that the emulator may order as it likes."""
    _C.riformer_cuda_set_seed(value)


@contextlib.contextmanager
def emulated(architecture: int = 90, processors: int = 4) -> Iterator[None]:
    """The GPU that kernels run on meanwhile. With 4 multiprocessors two slots of rows are few and three are many."""
    _C.riformer_cuda_set_device(architecture, processors)
    try:
        yield
    finally:
        _C.riformer_cuda_set_device(90, 4)


@pytest.fixture(name="architecture", params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def architecture_fixture(request: pytest.FixtureRequest) -> Iterator[int]:
    with emulated(request.param):
        yield request.param


@pytest.fixture(
    name="device",
    params=[(architecture, processors) for architecture in ARCHITECTURES for processors in (1, 1000)],
    ids=lambda device: f"sm_{device[0]}-{'many' if device[1] == 1 else 'few'}_rows",
)
def device_fixture(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Every way to run a block: rows are many on a GPU with one multiprocessor, and few on one with 1000."""
    with emulated(*request.param):
        yield request.param


# ------------------------------------------------------------------------- the ops under the signatures of the op tests


def moments_of(x: torch.Tensor, per_position: bool) -> torch.Tensor | None:
    return None if per_position else OPS.moments(x)


def run_block(x: torch.Tensor, p: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `support_ops.check_block` calls it."""
    return OPS.block(x, moments_of(x, p["per_position"]), *(p[name] for name in PARAMETERS))


def run_block_(x: torch.Tensor, p: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The op that overwrites its input, on a copy in the same layout. The copy lies between guards."""
    target = surrounded(x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous())
    found = moments_of(x, p["per_position"])
    found = None if found is None else surrounded(found)
    OPS.block_(target, found, *(p[name] for name in PARAMETERS))
    check_surroundings(target, found)
    return target.clone(), torch.empty((x.shape[0], 2, 0)) if found is None else found.clone()


def run_embed(x: torch.Tensor, p: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `test_embed.check_embed` calls it, which expects the CPU's NCHW."""
    out, found = OPS.embed(x, p["weight"], p["bias"], p["stride"], p["padding"], dtype, True)
    assert out.is_contiguous(memory_format=torch.channels_last), out.stride()
    return out.contiguous(), found


def run_norm(x, weight, bias, eps, per_position, dtype=None):
    return OPS.norm(x, moments_of(x, per_position), weight, bias, eps, per_position, dtype or x.dtype)


def run_head(x, p, per_position, dtype=None):
    found = moments_of(x, per_position)
    return OPS.head(x, found, p[0], p[1], EPS, p[2], p[3], per_position, dtype or x.dtype)


GUARD = 64  # elements; a multiple of what the kernels need to be aligned


def surrounded(x: Any) -> Any:
    """``x`` in the same layout with NaN on both sides."""
    if not isinstance(x, torch.Tensor):
        return x
    buffer = x.new_full((x.numel() + 2 * GUARD,), float("nan"))
    inner = buffer.as_strided(x.shape, x.stride(), GUARD)
    inner.copy_(x)
    return inner


def check_surroundings(*tensors: torch.Tensor | None) -> None:
    for x in tensors:
        if x is not None:
            buffer = x.as_strided((x.numel() + 2 * GUARD,), (1,), 0)
            assert buffer[:GUARD].isnan().all() and buffer[GUARD + x.numel() :].isnan().all(), "written outside x"


def use_for_the_op_tests() -> None:
    """From now on, test modules of the native ops that are imported test these ops instead."""
    support_ops.OPS = OPS
