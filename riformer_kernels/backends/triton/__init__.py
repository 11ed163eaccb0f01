"""The Triton backend: one kernel file per op, and what it takes to use them.

Importing this imports no Triton. The launchers are imported by the first call, so that the package and its CPU kernels
work where Triton is absent, and say why the GPU kernels do not.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ...dtypes import DTYPES
from ...errors import BackendError
from ...ops import ALL as OPS
from ...ops._library import LIBRARIES, NAMESPACE, overloads
from .. import _devices
from .._backend import Backend


@cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'riformer-kernels[triton]')"
    return None


def _no_compiler() -> str | None:
    """Triton compiles a piece of C for each kernel that it launches, with CC, else with gcc or clang."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "Triton needs a C compiler to launch kernels, and neither gcc nor clang was found; install one, or set CC"


def unusable() -> str | None:
    """Why no tensor on this machine can be served, or None."""
    return _no_triton() or _devices.no_device(why_not_device) or _no_compiler()


def why_not_device(device: torch.device) -> str | None:
    """Why tensors on this CUDA device are not served, or None."""
    return _devices.too_old(device)


@cache
def launcher(name: str) -> Callable[..., Any]:
    """The launcher of an op.

    Raises:
        BackendError: Triton is not installed.
    """
    if reason := _no_triton():
        raise BackendError(f"riformer::{name} on a CUDA tensor: {reason}")
    module = importlib.import_module(f"{__name__}.{OPS[name].file}")
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
    dtypes=DTYPES,
    unusable=unusable,
    detail=_devices.current,
    refuses=why_not_device,
    compiles=True,
    ops=overloads(NAMESPACE, OPS),
)
