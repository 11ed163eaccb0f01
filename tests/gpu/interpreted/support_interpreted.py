"""What the interpreted tests share: the launchers under the signatures of the op tests, forced choices, guard regions.

The files here run in a process of their own (`tests/test_triton.py`): Triton decides at its import whether it interprets.
Their names keep them out of an ordinary run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support_ops import EPS, PARAMETERS
from torch.utils._python_dispatch import TorchDispatchMode

from riformer_kernels.backends.triton import _launch, block, choice, embed, head, moments, norm

assert _launch.INTERPRETED, "these tests need TRITON_INTERPRET=1 from the start; run tests/test_triton.py"
GUARD = 256
POISON = 12345.0


def run_block(x: torch.Tensor, p: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `support_ops.check_block` calls it."""
    found = None if p["per_position"] else moments.moments(x)
    return block.block(x, found, *(p[name] for name in PARAMETERS))


def run_block_(x: torch.Tensor, p: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The op that overwrites its input, on a copy in the same layout."""
    x = x.clone() if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
    found = None if p["per_position"] else moments.moments(x)
    block.block_(x, found, *(p[name] for name in PARAMETERS))
    return x, torch.empty((x.shape[0], 2, 0)) if found is None else found


def run_embed(x: torch.Tensor, p: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `test_embed.check_embed` calls it, which expects the CPU's NCHW."""
    out, found = embed.embed(x, p["weight"], p["bias"], p["stride"], p["padding"], dtype, True)
    assert out.is_contiguous(memory_format=torch.channels_last), out.stride()
    return out.contiguous(), found


def run_norm(x, weight, bias, eps, per_position, dtype=None):
    found = None if per_position else moments.moments(x)
    return norm.norm(x, found, weight, bias, eps, per_position, dtype or x.dtype)


def run_head(x, p, per_position, dtype=None):
    found = None if per_position else moments.moments(x)
    return head.head(x, found, p[0], p[1], EPS, p[2], p[3], per_position, dtype or x.dtype)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[choice.BlockChoice], None]:
    """``force(chosen)``: every block runs this choice."""
    return lambda chosen: monkeypatch.setattr(choice, "choose_block", lambda problem: chosen)


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as its bits, multiplies those as integers, and rounds float32 to it by cutting
    off: both put right, so that the bfloat16 kernels compute what they say."""
    from triton.runtime import interpreter

    kind = interpreter.InterpreterBuilder
    dot, cast, tl = kind.create_dot, kind.cast_impl, interpreter.tl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(kind, "create_dot", create_dot)
    monkeypatch.setattr(kind, "cast_impl", cast_impl)
    for name in ("create_fp_trunc", "create_fp_ext", "create_fp_to_fp"):
        if hasattr(kind, name):
            monkeypatch.setattr(kind, name, lambda self, src, dst_type, *rest: cast_impl(self, src, dst_type))


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


def surrounded(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x`` in the same layout with NaN on both sides: whoever reads and uses that shows it."""
    if not isinstance(x, torch.Tensor):
        return x
    buffer = x.new_full((x.numel() + 2 * GUARD,), float("nan"))
    inner = buffer.as_strided(x.shape, x.stride(), GUARD)
    inner.copy_(x)
    return inner


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    with Guarded() as mode:
        yield
    mode.check()
