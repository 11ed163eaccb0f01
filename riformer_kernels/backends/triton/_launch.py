"""What every launcher does around a launch: layouts, alignment, the device, and errors that say what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, overload

import torch
import triton

from ...errors import BackendError, InputError
from ...ops._library import memory_format_of, needed
from ...precision import EXACT, products_of_float32

ALIGNMENT = 16
MOST_PROGRAMS = 2**31 - 1
MOST_ELEMENTS = 2**31 - 1
INTERPRETED = triton.knobs.runtime.interpret
INTERPRETED_ARCHITECTURE = 90


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its kernel, programs, positional arguments, and constexpr arguments with ``num_warps``."""

    kernel: triton.JITFunction
    programs: int
    arguments: tuple[Any, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class _Recording:
    architecture: int
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recorded(architecture: int) -> Iterator[list[Launch]]:
    """What the launchers would launch on a GPU of ``architecture``, instead of launching it. For tensors on the meta
    device: nothing is computed."""
    recording = _Recording(architecture, [])
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


@cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture_of(device: torch.device) -> int:
    """Compute capability as 80, 90, ...; what the tables are keyed on."""
    if device.type != "cuda":
        if recording := _recording.get():
            return recording.architecture
        if INTERPRETED:
            return INTERPRETED_ARCHITECTURE
        raise BackendError(
            f"the Triton kernels serve cuda tensors, found one on {device}; move it, or use backend='auto'"
        )
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make ``device`` current: Triton launches on the current device and stream, whatever the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(
    kernel: triton.JITFunction, programs: int, device: torch.device, *arguments: object, **settings: object
) -> None:
    """``kernel`` on a one-dimensional grid of ``programs`` on the current stream of ``device``.

    Multiply-adds are contracted explicitly (``enable_fp_fusion``), as Triton's default for it changes with 3.10.
    """
    if programs > MOST_PROGRAMS:
        raise InputError(
            f"this batch needs {programs} programs in one launch and a GPU takes {MOST_PROGRAMS}; split it"
        )
    if recording := _recording.get():
        recording.launches.append(Launch(kernel, programs, arguments, settings))
        return
    with on(device):
        kernel[(programs,)](*arguments, **settings, enable_fp_fusion=True)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy where its first element is not on a 16-byte boundary.

    Triton compiles another variant for such pointers, which may add in another order: an image sliced out of a batch
    has to give the same bits as in it.
    """
    if x.device.type == "meta" or x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone()


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """``x`` [B, C, H, W] with its channels contiguous in memory; a copy only where they are not."""
    if x.shape[1] * x.shape[2] * x.shape[3] > MOST_ELEMENTS:
        raise InputError(f"one image of tokens has {tuple(x.shape[1:])} elements, more than 32-bit offsets reach")
    return aligned(x.contiguous(memory_format=torch.channels_last))


def result_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty result with channels contiguous, to be handed to ``in_layout_of`` when written."""
    one_order = x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1
    layout = memory_format_of(x) if one_order else torch.channels_last
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)


def in_layout_of(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``out`` in the memory format of ``x``; a copy only for an NCHW ``x``."""
    return out.contiguous(memory_format=memory_format_of(x))


def matrix(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] or [out, in, 1, 1] as a row-major matrix; a copy only where it is not one."""
    return weight.flatten(1).contiguous()


@overload
def vector(parameter: torch.Tensor) -> torch.Tensor: ...
@overload
def vector(parameter: None) -> None: ...
@overload
def vector(parameter: torch.Tensor | None) -> torch.Tensor | None: ...
def vector(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter with C elements in any shape, dense."""
    return None if parameter is None else parameter.reshape(-1).contiguous()


def dense_moments(moments: torch.Tensor | None) -> torch.Tensor:
    """Moments [B, 2, C] as the kernels read them; those of an op that cannot do without."""
    return needed(moments).to(torch.float32).contiguous()


def precision(dtype: torch.dtype) -> str:
    """How products of ``dtype`` are taken: float32's exactly, unless PyTorch itself is told that TF32 will do."""
    return products_of_float32() if dtype == torch.float32 else EXACT


def block_of(channels: int) -> int:
    """The power of two that a vector of ``channels`` is loaded as; at least 16."""
    return max(16, triton.next_power_of_2(channels))


def rows_of(channels: int) -> int:
    """Rows of a tile whose rows hold all channels at once: what registers allow. Depends on C alone."""
    return max(1, min(16, 4096 // block_of(channels)))
