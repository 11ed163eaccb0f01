"""The ceilings of this processor: `peak.cpp`, compiled when first needed, run with one thread and with all."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import isa as instruction_sets
from child import HERE

from riformer_kernels.timing import Samples

SOURCE = HERE / "peak.cpp"
FLAGS = ("-O2", "-std=c++17", "-pthread")
SECONDS, SAMPLES, PASSES = 0.02, 12, 4
NOTE = "registers only; the best of the samples, since a disturbance can only lower it"
COPY_NOTE = "bytes read and bytes written, 256 MB from one place in memory to another; the best of the samples"


def cache() -> Path:
    """Where the compiled probe is kept: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "riformer_kernels"


@functools.cache
def build() -> Path:
    """The compiled probe. Its name holds a digest of source and compiler: where one has changed, a new one is compiled.

    Raises:
        OSError: there is no compiler, or it fails; the text says which.
    """
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)
    if compiler is None:
        raise OSError(f"no C++ compiler ({named or 'c++, g++, clang++'} not found)")
    digest = hashlib.sha256(SOURCE.read_bytes() + compiler.encode()).hexdigest()[:12]
    target = cache() / f"peak-{digest}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise OSError(f"{Path(compiler).name} fails on peak.cpp: {first[:300]}")
        partial.replace(target)
    return target


def _run(*arguments: str) -> list[str]:
    done = subprocess.run([str(build()), *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise OSError(f"the probe failed ({done.returncode}): {done.stderr.strip()[:300]}")
    return done.stdout.split()


def rows(
    threads: int, *, seconds: float = SECONDS, samples: int = SAMPLES, passes: int = PASSES
) -> list[dict[str, Any]]:
    """A "ceiling" row per kind of operation that the processor has, with one thread and with ``threads``.

    Rates are in TFLOP/s, of int8 in TOP/s, of the copy in GB/s; a multiply-add is two operations. All kinds are sampled
    one after the other, ``passes`` times, so that a disturbance of a second does not spoil all samples of one of them.
    Where the probe cannot be built or run, the only row has the reason.
    """
    common = {"kind": "ceiling", "source": "probe", "device": "cpu"}
    try:
        cases = [(kind, count) for kind in _run("list") for count in dict.fromkeys((1, threads))]
        rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        for _ in range(passes):
            for kind, count in cases:
                rates[kind, count] += map(float, _run(kind, str(count), str(seconds), str(samples)))
    except (OSError, subprocess.TimeoutExpired) as error:
        return [{**common, "operation": None, "threads": threads, "reason": str(error)}]
    found = []
    for (kind, count), values in rates.items():
        operation, _, instructions = kind.partition("-")
        copied = operation == "copy"
        key, unit, note = ("gbyte_per_s", 1e9, COPY_NOTE) if copied else ("tflop_per_s", 1e12, NOTE)
        sampled = Samples(tuple(values))
        found.append({
            **common, "operation": operation, "isa": instructions or None, "threads": count, key: max(values) / unit,
            f"{key}_median": sampled.median / unit, "spread": sampled.spread, "rounds": sampled.rounds, "note": note,
            "reason": None,
        })  # fmt: skip
    return found


def ceiling(found: Sequence[dict[str, Any]], dtype: str, isa: str | None, threads: int) -> float | None:
    """FLOP/s that ``dtype`` can reach with instruction set ``isa`` or any below it; None where no row says so.

    A dtype without instructions of its own is computed in float32, whose ceiling holds then.
    """
    usable = instruction_sets.up_to(isa)
    rates = {
        operation: [
            row["tflop_per_s"]
            for row in found
            if row.get("source") == "probe" and row["operation"] == operation and row["threads"] == threads
            and row["isa"] in usable
        ]
        for operation in (dtype, "float32")
    }  # fmt: skip
    best = max(rates[dtype] or rates["float32"], default=None)
    return None if best is None else 1e12 * best


def bandwidth(found: Sequence[dict[str, Any]], threads: int) -> float | None:
    """Bytes per second of the copy, or None."""
    rates = [row["gbyte_per_s"] for row in found if row.get("operation") == "copy" and row["threads"] == threads]
    return 1e9 * rates[0] if rates else None
