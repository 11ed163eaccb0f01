"""What the machine is: the processor's name and features, the CPUs that this process may use, PyTorch's threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's name."""
    for key, value in _cpuinfo():
        if key in ("model name", "Model", "cpu model") and value:
            return value
    return platform.processor() or platform.machine() or "unknown"


def cpu_flags() -> frozenset[str]:
    """The processor's features as Linux names them; empty where the system does not say."""
    return next((frozenset(value.split()) for key, value in _cpuinfo() if key == "flags"), frozenset())


def usable_cpus() -> int:
    """How many logical CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> list[tuple[str, str]]:
    """Keys and values of /proc/cpuinfo; none where there is no such file."""
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return []
    parts = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, _, value in parts]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside the block PyTorch has ``count`` threads; None leaves their number as it is."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
