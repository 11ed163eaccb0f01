"""What a measurement was made on, and how busy other processes kept the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "avx512_vnni",
    "amx_tile", "amx_bf16", "amx_fp16", "amx_int8",
)  # fmt: skip

VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY", "KMP_AFFINITY",
    "KMP_BLOCKTIME", "LD_PRELOAD", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS",
    "RIFORMER_CPU_ISA",
)  # fmt: skip
"""Variables that change how fast peers are; a result that users should be able to repeat has none of them."""


def machine() -> dict[str, Any]:
    """What a measurement was made on: processor, versions, threads, commit, date. No host names, no paths."""
    import numpy
    import torch

    import riformer_kernels
    from riformer_kernels.backends import cpu
    from riformer_kernels.machine import cpu_flags, cpu_name, usable_cpus

    isa = cpu.isa_status()
    return {
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "flags": [flag for flag in FLAGS if flag in cpu_flags()],
        "caches": _caches(),
        "isa": isa["chosen"],
        "isa_supported": isa["supported"],
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "environment": {name: os.environ[name].rpartition("/")[2] for name in VARIABLES if name in os.environ},
        "riformer_kernels": riformer_kernels.__version__,
        **_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _caches() -> dict[str, str]:
    """Size of each cache of the first core, such as {"L1d": "48K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def _commit() -> dict[str, Any]:
    """The commit that the code is from, and whether files (results aside) differ from it; None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


class Elsewhere:
    """The share of the processors' time that other processes took inside the block; None if not known.

    Only the processors that this process may use are counted. This process, without its children, and the processes of
    ``own`` (`worker.Worker.pid`) are not others; they have to live until the block ends.
    """

    share: float | None = None

    def __init__(self, own: Iterable[int] = ()) -> None:
        self._own = tuple(own)

    def __enter__(self) -> Elsewhere:
        self._before = self._now()
        return self

    def __exit__(self, *exception: object) -> None:
        now = self._now()
        if now is None or self._before is None:
            return
        busy, total, own = (after - before for after, before in zip(now, self._before, strict=True))
        self.share = min(1.0, max(0.0, (busy - own) / total)) if total > 0 else None

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds since the start: busy, all, own."""
        try:
            allowed = {f"cpu{index}" for index in os.sched_getaffinity(0)}
            lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
            tick = os.sysconf("SC_CLK_TCK")
            # After the name, which is in parentheses and may hold blanks: fields 12 and 13 are user and system.
            others = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self._own]
        except (OSError, AttributeError, ValueError):
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is contained in user.
        fields = [[int(value) / tick for value in line[1:9]] for line in lines if line and line[0] in allowed]
        total = sum(map(sum, fields))
        idle = sum(field[3] + field[4] for field in fields)
        mine = os.times()
        own = mine.user + mine.system + sum(int(field[11]) + int(field[12]) for field in others) / tick
        return total - idle, total, own
