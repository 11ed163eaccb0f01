"""The CUDA backend: ``csrc/cuda`` built into a library of its own.

Its kernels serve the ops of the ``riformer_cuda`` namespace, as the CUDA kernels of ``riformer`` are Triton's. Which of
the two is faster where has not been measured on a GPU; until then "auto" takes these only where Triton is not usable.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from .. import ops  # the schemas must exist before the library adds its kernels
from ..dtypes import DTYPES, number_of
from ..ops._library import CUDA_NAMESPACE, overloads
from . import _devices
from ._backend import Backend

LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "libriformer_cuda.so"
BUILD_NOTE = LIBRARY.with_name("cuda_not_built.txt")


def not_built() -> str | None:
    """Why there is no library, or None."""
    if LIBRARY.is_file():
        return None
    if BUILD_NOTE.is_file():
        return BUILD_NOTE.read_text().strip()
    return (
        f"not built: {LIBRARY.name} is missing; install the package with the CUDA toolkit (nvcc) and a CUDA build of "
        "PyTorch present (pip install --no-build-isolation .)"
    )


@cache
def _load() -> str | None:
    """Load the library once; None on success, otherwise the reason in one line."""
    if reason := not_built():
        return reason
    if torch.version.cuda is None:
        return _devices.no_cuda()  # the library needs libtorch_cuda.so
    try:
        torch.ops.load_library(str(LIBRARY))
        return _library().riformer_cuda_driver_error().decode() or None
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error.__cause__ or error}"


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("riformer_cuda_architectures", "riformer_cuda_driver_error", "riformer_cuda_choice"):
        getattr(library, name).restype = ctypes.c_char_p
    library.riformer_cuda_choice.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_int] * 3
    return library


def unusable() -> str | None:
    """Why no tensor on this machine can be served, or None."""
    return _load() or _devices.no_device(why_not_device)


def why_not_device(device: torch.device) -> str | None:
    """Why tensors on this CUDA device are not served, or None."""
    if reason := _devices.too_old(device):
        return reason
    index = torch.cuda.current_device() if device.index is None else device.index
    major, minor = _devices.capability(index)
    if not _library().riformer_cuda_serves(10 * major + minor):
        return (
            f"the CUDA kernels are compiled for {', '.join(architectures())} and cuda:{index} has compute capability "
            f"{major}.{minor}; install the package with RIFORMER_CUDA_ARCHITECTURES={major}{minor}"
        )
    return None


def architectures() -> list[str]:
    """What the library is compiled for, such as "80" and "90a"; empty where it is not loaded."""
    return [] if _load() else _library().riformer_cuda_architectures().decode().split(", ")


def block_choice(
    batch: int, channels: int, hidden: int, positions: int, dtype: torch.dtype, architecture: int, processors: int
) -> str:
    """Which kernels with which tiles a block runs on a GPU of ``architecture`` (80, 90, ...) with so many
    multiprocessors; for reports. The library must be loaded."""
    kind = number_of(dtype)
    found = _library().riformer_cuda_choice(batch, channels, hidden, positions, kind, architecture, processors)
    return found.decode()


# Registering the kernels is all that happens at import; programs that torch.export or AOTInductor saved need no more.
_load()

BACKEND = Backend(
    name="cuda",
    automatic=True,
    devices=("cuda",),
    dtypes=DTYPES,
    unusable=unusable,
    detail=_devices.current,
    refuses=why_not_device,
    ops=overloads(CUDA_NAMESPACE, ops.ALL),
)
