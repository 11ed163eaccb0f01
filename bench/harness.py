"""How this folder measures: interleaved timing, and peak memory of one call. (`machine.py`: on what.)

Absolute times on a shared machine mean little, so everything that is compared runs in one process and takes turns:
one call of each per round, in rotating order. A ratio is the median of the ratios of each round's pair, so that a
disturbance that lasts longer than a round cancels out.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------- timing

MOST_SPREAD = 0.25
MOST_ELSEWHERE = 0.25
TOO_NOISY = "too noisy to judge"
SHORTEST_SAMPLE = 1e-3


def percentile(values: tuple[float, ...] | list[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie, interpolated."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one value per round. Values of the same index in two ``Samples`` are of the same round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return percentile(self.seconds, 0.5)

    @property
    def p20(self) -> float:
        return percentile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        return percentile(self.seconds, 0.8)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def rounds(self) -> int:
        return len(self.seconds)

    @property
    def spread(self) -> float:
        """(p80 - p20) / median."""
        return (self.p80 - self.p20) / self.median

    def per_second(self, items: float) -> tuple[float, float, float]:
        """``items`` per call as a rate: median, 20th and 80th percentile of the rate."""
        return items / self.median, items / self.p80, items / self.p20


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ours is: median, 20th and 80th percentile of the ratios of each round."""

    median: float
    p20: float
    p80: float


def ratio(ours: Samples, peer: Samples) -> Ratio:
    """Speed of ours over that of the peer, above 1 when ours is faster; both from one ``interleave``."""
    if ours.rounds != peer.rounds:
        raise ValueError(f"not from one interleave: {ours.rounds} rounds against {peer.rounds}")
    pairs = [theirs / mine for mine, theirs in zip(ours.seconds, peer.seconds)]
    return Ratio(percentile(pairs, 0.5), percentile(pairs, 0.2), percentile(pairs, 0.8))


def verdict(ours: Samples, peer: Samples, elsewhere: float | None = None) -> str:
    """ "faster" or "slower" where 80 % of the rounds say so, else "even"; withheld when either side scatters too much,
    or when too large a share of the machine was busy ``elsewhere``.

    The second because a steady disturbance does not scatter: measured, with one of two cores taken by another process,
    both threads of a small model shared the other for seconds, and each of their barriers took a time slice.
    """
    if max(ours.spread, peer.spread) > MOST_SPREAD or (elsewhere or 0.0) > MOST_ELSEWHERE:
        return TOO_NOISY
    found = ratio(ours, peer)
    return "faster" if found.p20 > 1 else "slower" if found.p80 < 1 else "even"


def interleave(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    min_rounds: int = 5,
    warmup: int = 2,
    *,
    synchronize: Callable[[], object] | None = None,
    shortest: float = SHORTEST_SAMPLE,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Time ``functions`` round robin, so that whatever else the machine does slows all of them alike.

    The order rotates by one each round: nobody always runs after the same one, on its cache contents. The garbage
    collector rests meanwhile. Exceptions pass through: call a function that may fail once before.

    Args:
        functions: by name; each is one call of what is compared.
        seconds: for all rounds together; the round that passes it is finished.
        min_rounds: as many at least, however long they take.
        warmup: untimed calls of each before.
        synchronize: waits for the device (``torch.cuda.synchronize``), called before each reading of the clock.
        shortest: a sample is the mean of as many calls in a row as take this long.
        clock: seconds; for tests.
    """
    if not functions:
        return {}
    wait = synchronize or (lambda: None)

    def timed(function: Callable[[], object], calls: int) -> float:
        wait()
        start = clock()
        for _ in range(calls):
            function()
        wait()
        return (clock() - start) / calls

    calls = {}
    for name, function in functions.items():
        taken = [timed(function, 1) for _ in range(max(1, warmup))]
        calls[name] = max(1, math.ceil(shortest / max(min(taken), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        until, rounds = clock() + seconds, 0
        while rounds < min_rounds or clock() < until:
            for position in range(len(names)):
                name = names[(rounds + position) % len(names)]
                found[name].append(timed(functions[name], calls[name]))
            rounds += 1
    finally:
        if enabled:
            gc.enable()
    return {name: Samples(tuple(values)) for name, values in found.items()}


# ----------------------------------------------------------------------------------------------------------- memory


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

    In this process it could not be: memory that earlier calls freed stays resident in the allocator and hides what a
    later call needs. The fresh process builds the subject, calls it once at batch ``small`` (which loads code, starts
    the thread pool and touches the weights), allocates the input, gives freed memory back to the system, resets the
    kernel's peak counter (``/proc/self/clear_refs``), and makes the one call at ``batch``. Input and weights are
    therefore not counted; activations, scratch memory, copies of weights made by the call, and the result are. Nor is
    what a call keeps for the next one at any batch: the small call has it already (PyTorch's thread pool, compiled
    primitives, the per-thread scratch of the engine).

    Where the counter cannot be reset, a thread samples the resident size, and the reason says so.

    Args:
        target: "module:function", importable there; ``function(**arguments)`` returns ``prepare``, and
            ``prepare(batch)`` a call without arguments whose input exists already.
        arguments: JSON values.
        threads: PyTorch's threads; None leaves its choice.
        limit: seconds after which the process is stopped.
    """
    request = {"target": target, "arguments": dict(arguments), "batch": batch, "small": small, "threads": threads}
    path = os.pathsep.join(dict.fromkeys([str(HERE), *(entry for entry in sys.path if entry)]))
    command = [sys.executable, str(HERE / "harness.py"), json.dumps(request)]
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=limit
        )
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
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc


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
