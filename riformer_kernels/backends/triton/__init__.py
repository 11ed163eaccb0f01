"""The Triton backend: one kernel file per op, and what it takes to use them.

Importing this imports no Triton. The launchers are imported by the first call, so that the package and its CPU kernels
work where Triton is absent, and say why the GPU kernels do not.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ...errors import BackendError
from ...ops import ALL as OPS
from ...ops._library import LIBRARIES, NAMESPACE, overloads
from .._backend import Backend

MINIMUM_ARCHITECTURE = 80


@cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'riformer-kernels[triton]')"
    return None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def unusable() -> str | None:
    """Why no tensor on this machine can be served, or None."""
    if reason := _no_triton():
        return reason
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    reasons = [why_not_device(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return None if None in reasons else "; ".join(reason for reason in reasons if reason)


def why_not_device(device: torch.device) -> str | None:
    """Why tensors on this CUDA device are not served, or None."""
    index = torch.cuda.current_device() if device.index is None else device.index
    major, minor = _capability(index)
    if 10 * major + minor < MINIMUM_ARCHITECTURE:
        name = torch.cuda.get_device_name(index)
        return f"cuda:{index} ({name}) has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later"
    return None


def detail() -> str:
    major, minor = _capability(torch.cuda.current_device())
    return f"sm_{major}{minor}"


@cache
def launcher(name: str) -> Callable[..., Any]:
    """The launcher of an op.

    Raises:
        BackendError: Triton is not installed.
    """
    if reason := _no_triton():
        raise BackendError(f"riformer::{name} on a CUDA tensor: {reason}")
    module = importlib.import_module(f"{__name__}.{name.rstrip('_')}")
    return getattr(module, name)


def _registered(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return launcher(name)(*arguments)

    call.__name__ = name
    return call


# A registration is all that happens at import, as with the CPU library: saved programs need no more.
for _name in OPS:
    LIBRARIES[NAMESPACE].impl(_name, _registered(_name), "CUDA")

BACKEND = Backend(
    name="triton",
    automatic=True,
    devices=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    unusable=unusable,
    detail=detail,
    refuses=why_not_device,
    compiles=True,
    **overloads(NAMESPACE, OPS),
)
