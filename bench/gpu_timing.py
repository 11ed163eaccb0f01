"""Timing on a GPU: by the device's events in turns, latencies by the wall clock, and the machine's two ceilings."""

from __future__ import annotations

import contextlib
import functools
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch

from riformer_kernels.timing import Samples, percentile, rotate

DEVICE = "cuda"
COPY_BYTES = 2 << 30
SIDE = 8192
SAMPLE_SECONDS = 0.02
ROUNDS = 9
LATENCIES = 200


class Clock:
    """What is left of the time for the whole command."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class TimeIsUpError(Exception):
    """What was begun took longer than it was given."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeIsUpError in the block after so many seconds. Between two lines of Python: a compiler's own process is
    not stopped, but nobody waits for it any more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimeIsUpError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(call: Callable[[], object], calls: int) -> float:
    """Seconds per call, by device events around ``calls`` of them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def interleaved(functions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, Samples]:
    """`rotate` by the device's clock: each sample is of as many calls as take ``SAMPLE_SECONDS``."""
    samplers = {name: functools.partial(timed, function) for name, function in functions.items()}
    return rotate(samplers, 0.0, min_rounds=rounds, warmup=3, shortest=SAMPLE_SECONDS)


def latencies(call: Callable[[], object], count: int = LATENCIES) -> dict[str, float]:
    """Percentiles of single calls by the wall clock, in milliseconds, each until the GPU has done."""
    taken = []
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(count):
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - start))
    finally:
        if enabled:
            gc.enable()
    return {f"latency_ms_p{share}": percentile(taken, share / 100) for share in (50, 90, 99)}


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and the rate of an 8192^3 bf16 product of random values."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source), "matrix": lambda: a @ b})
    median = {name: samples.median for name, samples in times.items()}
    return {"gbyte_per_s": 2 * COPY_BYTES / median["copy"] / 1e9, "tflop_per_s": 2 * SIDE**3 / median["matrix"] / 1e12}


def peak_bytes(call: Callable[[], object]) -> int:
    """Extra peak memory of one call."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before
