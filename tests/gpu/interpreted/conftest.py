"""Fixtures of the tests in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """These tests use one thread."""


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """``force(chosen)``: every block runs this choice."""
    from riformer_kernels.backends.triton import choice

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
