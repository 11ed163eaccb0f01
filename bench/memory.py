"""Extra peak resident memory of one call, measured in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from child import HERE, child_environment


@dataclass(frozen=True)
class Memory:
    """Extra peak resident memory of one call.

    Attributes:
        extra_bytes: peak while the call runs, minus what was resident before it; None when not measured.
        method: "VmHWM" (exact: the kernel keeps the peak) or "sampled" (a lower bound); None when not measured.
        reason: why it is not the exact method, or not measured; else None.
    """

    extra_bytes: int | None
    method: str | None
    reason: str | None = None


def peak_memory(
    target: str,
    arguments: Mapping[str, Any],
    batch: int,
    *,
    small: int = 1,
    threads: int | None = None,
    limit: float = 600,
) -> Memory:
    """Extra peak resident memory of one call, measured in a fresh process.

    It could not be measured in this process: memory that earlier calls freed stays resident in the allocator and hides
    what a later call needs. The fresh process does this:

    1. It builds the subject and calls it once at batch ``small``. This loads code, starts the thread pool and touches
       the weights.
    2. It allocates the input and gives freed memory back to the system.
    3. It resets the kernel's peak counter (``/proc/self/clear_refs``).
    4. It makes the one call at ``batch``.

    Counted are activations, scratch memory, copies of weights that the call makes, and the result. Not counted are the
    input, the weights, and what a call keeps for the next one at any batch, which the small call has already:
    PyTorch's thread pool, compiled primitives, the engine's scratch memory of each thread.

    Where the counter cannot be reset, a thread samples the resident size, and the reason says so.

    Args:
        target: "module:function", importable there; ``function(**arguments)`` returns ``prepare``, and
            ``prepare(batch)`` a call without arguments whose input exists already.
        arguments: JSON values.
        threads: PyTorch's threads; None leaves its choice.
        limit: seconds after which the process is stopped.
    """
    request = {"target": target, "arguments": dict(arguments), "batch": batch, "small": small, "threads": threads}
    command = [sys.executable, str(HERE / "memory.py"), json.dumps(request)]
    try:
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return Memory(None, None, f"the measuring process took more than {limit:g} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Memory(None, None, f"the measuring process failed ({done.returncode}): {last[:300]}")
    return Memory(**json.loads(done.stdout.strip().splitlines()[-1]))


def _probe(request: dict[str, Any]) -> Memory:
    """The fresh process's part of ``peak_memory``."""
    import torch

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    module, _, name = request["target"].partition(":")
    prepare = getattr(importlib.import_module(module), name)(**request["arguments"])
    with torch.inference_mode():
        prepare(request["small"])()
        call = prepare(request["batch"])
        gc.collect()
        _give_back_freed_memory()
        reason = _reset_peak()
        if reason is None:
            before = _resident()["VmRSS"]
            result = call()
            memory = Memory(max(0, _resident()["VmHWM"] - before), "VmHWM")
        else:
            memory, result = _sampled(call, reason)
    del result
    return memory


def _give_back_freed_memory() -> None:
    # Another C library than glibc has no such function.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> dict[str, int]:
    """VmRSS and VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("VmRSS:", "VmHWM:")))
    return {field[0].rstrip(":"): 1024 * int(field[1]) for field in fields}


def _reset_peak() -> str | None:
    """Set VmHWM to VmRSS; None on success, else the reason."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        now = _resident()
        off = now["VmHWM"] - now["VmRSS"]
    except (OSError, KeyError) as error:
        return f"the peak counter cannot be reset here ({type(error).__name__})"
    return None if off < 1 << 20 else f"the peak counter was not reset: it is {off} bytes above what is resident"


def _sampled(call: Callable[[], object], reason: str) -> tuple[Memory, object]:
    """Peak by a thread that looks every half millisecond: it can miss a short peak."""
    try:
        import psutil
    except ImportError:
        return Memory(None, None, f"{reason}, and psutil, which could sample it, is not installed"), call()
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        peak = max(peak, process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    return Memory(peak - before, "sampled", f"{reason}: sampled, a lower bound"), result


if __name__ == "__main__":
    print(json.dumps(asdict(_probe(json.loads(sys.argv[1])))))
