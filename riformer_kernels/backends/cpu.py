"""The native CPU backend: ``csrc/cpu`` built into a library that PyTorch loads; one instruction set chosen at load."""

from __future__ import annotations

import ctypes
import json
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .. import ops  # the schemas must exist before the library adds its kernels
from ..dtypes import DTYPES
from ..errors import BackendError
from ..network import Prepared
from ..ops._library import NAMESPACE, overloads
from ._backend import Backend

LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "libriformer_cpu.so"
BUILD_NOTE = LIBRARY.with_name("cpu_not_built.txt")
ISA_VARIABLE = "RIFORMER_CPU_ISA"


@cache
def _load() -> str | None:
    """Load the library once; None on success, otherwise the reason in one line."""
    if not LIBRARY.is_file():
        if BUILD_NOTE.is_file():
            return BUILD_NOTE.read_text().strip()
        return (
            f"not built: {LIBRARY.name} is missing; install the package with a C++17 compiler present "
            "(pip install --no-build-isolation .)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    return None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.riformer_cpu_describe.restype = ctypes.c_char_p
    library.riformer_cpu_select.restype = ctypes.c_char_p
    library.riformer_cpu_select.argtypes = [ctypes.c_char_p]
    return library


@cache
def _forced_isa_error() -> str | None:
    error = isa_status()["error"]
    return f"{ISA_VARIABLE}={os.environ.get(ISA_VARIABLE)}: {error}" if error else None


def unusable() -> str | None:
    """Why the native backend cannot be used here, or None."""
    return _load() or _forced_isa_error()


def isa_status() -> dict:
    """What the library found: ``chosen``, ``supported`` and ``compiled`` instruction sets, ``features``, ``error``, and
    those of the features that the chosen set has ``used``."""
    if _load() is not None:
        return {"chosen": None, "used": [], "supported": [], "compiled": [], "features": {}, "error": None}
    return json.loads(_library().riformer_cpu_describe())


def select_isa(name: str) -> None:
    """Use instruction set ``name`` from now on, in the whole process; "" for the automatic choice. For tests and
    benchmarks: everyone else sets ``RIFORMER_CPU_ISA`` before the first use.

    Raises:
        BackendError: the machine lacks it (the features are named), it is unknown, or the library is not usable.
    """
    reason = _load() or _library().riformer_cpu_select(name.encode()).decode()
    if reason:
        raise BackendError(f"cannot select instruction set {name!r}: {reason}")
    _forced_isa_error.cache_clear()


def detail() -> str:
    return str(isa_status()["chosen"])


def prepare(kinds: list[int], values: list[Any], integers: list[int], reals: list[float]) -> Prepared:
    """Tell the library of a network; see ``network.py``."""
    library = torch.ops.riformer
    number = library.network_prepare.default(kinds, values, integers, reals)
    return Prepared(values, partial(library.network.default, number), partial(library.network_release.default, number))


def slow(dtype: torch.dtype) -> str | None:
    """Without VNNI a product of bytes takes six instructions in place of one. Measured for S12, on AVX-512 and on AVX2:
    1.25x float32's speed, where VNNI gives 2.2x."""
    if dtype != torch.int8 or any(feature.endswith("vnni") for feature in isa_status()["used"]):
        return None
    return f"no VNNI in instruction set {detail()!r}, so at most 1.25x as fast as float32"


# Registering the kernels is all that happens at import; programs that torch.export or AOTInductor saved need no more.
_load()

BACKEND = Backend(
    int8=True,
    slow=slow,
    name="cpu",
    automatic=True,
    devices=("cpu",),
    dtypes=DTYPES,
    unusable=unusable,
    detail=detail,
    ops=overloads(NAMESPACE, ops.ALL),
    prepare=prepare,
)
