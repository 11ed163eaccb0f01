"""The backends: who computes the ops, on which devices and dtypes, and if not, why not.

Choosing a backend is a pure function of (device, dtype, name asked for); it raises rather than falls back.
"""

from __future__ import annotations

import torch

from .. import dtypes
from ..errors import BackendError
from . import cpu, cuda, reference, triton
from ._backend import Backend

# In the order in which "auto" asks them.
ALL: dict[str, Backend] = {
    backend.name: backend for backend in (cpu.BACKEND, triton.BACKEND, cuda.BACKEND, reference.BACKEND)
}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for tokens of ``dtype`` on ``device``.

    Args:
        name: "auto" (the first of "cpu", "triton" and "cuda" that is usable and serves the device) or a backend's
            name. "reference" is plain PyTorch, any device, never chosen by "auto".

    Raises:
        BackendError: unknown name, or no usable backend serves this device and dtype; the message says why not.
    """
    if name != "auto":
        if name not in ALL:
            raise BackendError(f"unknown backend {name!r}: expected 'auto' or one of {sorted(ALL)}")
        reason = ALL[name].why_not(device, dtype)
        if reason:
            raise BackendError(f"backend {name!r} cannot serve {dtype} on {device}: {reason}")
        return ALL[name]
    reasons = []
    for backend in ALL.values():
        if not backend.automatic:
            continue
        reason = backend.why_not(device, dtype)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    served = {device_type for backend in ALL.values() if backend.automatic for device_type in backend.devices}
    if device.type in served and any(backend.automatic and dtype in backend.dtypes for backend in ALL.values()):
        way_out = "`riformer-kernels info` shows what is built and usable here"
    else:
        way_out = f"Move the model to {' or '.join(sorted(served))} and convert it to {dtypes.ANY}"
    raise BackendError(
        f"no backend serves {dtype} on {device} ({'; '.join(reasons)}). {way_out}, or ask for plain PyTorch with "
        "backend='reference'"
    )


__all__ = ["ALL", "Backend", "choose"]
