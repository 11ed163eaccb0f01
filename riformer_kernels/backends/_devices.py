"""The CUDA devices of this machine: which of them the GPU backends serve, and if not, why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

MINIMUM_ARCHITECTURE = 80


@cache
def capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def no_cuda() -> str | None:
    """Why this PyTorch runs nothing on a GPU, or None."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    return None


def no_device(why_not: Callable[[torch.device], str | None]) -> str | None:
    """Why none of the devices is served, or None; ``why_not`` asks for one of them."""
    if reason := no_cuda():
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    reasons = [why_not(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return None if None in reasons else "; ".join(reason for reason in reasons if reason)


def too_old(device: torch.device) -> str | None:
    index = torch.cuda.current_device() if device.index is None else device.index
    major, minor = capability(index)
    if 10 * major + minor < MINIMUM_ARCHITECTURE:
        name = torch.cuda.get_device_name(index)
        return f"cuda:{index} ({name}) has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later"
    return None


def current() -> str:
    """The architecture of the current device, such as "sm_90"."""
    major, minor = capability(torch.cuda.current_device())
    return f"sm_{major}{minor}"
