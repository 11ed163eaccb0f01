"""How this folder measures time: in turns, with medians, spread, and a verdict that is withheld when it would be a guess.

Absolute times on a shared machine mean little, so everything that is compared takes turns: one sample of each per
round, in rotating order. A ratio is the median of the ratios of each round's pair, so that a disturbance that lasts
longer than a round cancels out. (`memory.py`: peak memory; `worker.py`: peers in processes of their own; `machine.py`:
measured on what.)
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for another Python that imports what this one can, with ``extra`` on top."""
    path = os.pathsep.join(dict.fromkeys([str(HERE), *(entry for entry in sys.path if entry)]))
    return {**os.environ, "PYTHONPATH": path, **(extra or {})}


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


def too_noisy(samples: Iterable[Samples], elsewhere: float | None = None) -> bool:
    """Whether any of them scatters too much, or too large a share of the machine was busy ``elsewhere``.

    The second because a steady disturbance does not scatter: measured, with one of two cores taken by another process,
    both threads of a small model shared the other for seconds, and each of their barriers took a time slice.
    """
    return max(found.spread for found in samples) > MOST_SPREAD or (elsewhere or 0.0) > MOST_ELSEWHERE


def verdict(ours: Samples, peer: Samples, elsewhere: float | None = None) -> str:
    """ "faster" or "slower" where 80 % of the rounds say so, else "even"; withheld where it is `too_noisy`."""
    if too_noisy((ours, peer), elsewhere):
        return TOO_NOISY
    found = ratio(ours, peer)
    return "faster" if found.p20 > 1 else "slower" if found.p80 < 1 else "even"


def rotate(
    samplers: Mapping[str, Callable[[int], float]],
    seconds: float,
    min_rounds: int = 5,
    warmup: int = 2,
    *,
    shortest: float = SHORTEST_SAMPLE,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Sample round robin, so that whatever else the machine does slows all of them alike.

    The order rotates by one each round: nobody always runs after the same one, on its cache contents. Exceptions pass
    through: call a function that may fail once before.

    Args:
        samplers: by name; each makes that many calls in a row and returns the seconds of one.
        seconds: for all rounds together; the round that passes it is finished.
        min_rounds: as many at least, however long they take.
        warmup: samples of one call of each before, which only decide how many calls a sample has.
        shortest: a sample is the mean of as many calls in a row as take this many seconds.
        clock: seconds; for tests.
    """
    calls = {}
    for name, sampler in samplers.items():
        taken = [sampler(1) for _ in range(max(1, warmup))]
        calls[name] = max(1, math.ceil(shortest / max(min(taken), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    until, rounds = clock() + seconds, 0
    while names and (rounds < min_rounds or clock() < until):
        for position in range(len(names)):
            name = names[(rounds + position) % len(names)]
            found[name].append(samplers[name](calls[name]))
        rounds += 1
    return {name: Samples(tuple(values)) for name, values in found.items()}


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
    """`rotate` for functions of this process, each one call of what is compared; the garbage collector rests meanwhile.

    For functions that share PyTorch's threads: two thread pools in one process disturb each other (`worker.py`).

    Args:
        synchronize: waits for the device (``torch.cuda.synchronize``), called before each reading of the clock.
    """
    wait = synchronize or (lambda: None)

    def sampler(function: Callable[[], object]) -> Callable[[int], float]:
        def sample(calls: int) -> float:
            wait()
            start = clock()
            for _ in range(calls):
                function()
            wait()
            return (clock() - start) / calls

        return sample

    samplers = {name: sampler(function) for name, function in functions.items()}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        return rotate(samplers, seconds, min_rounds, warmup, shortest=shortest, clock=clock)
    finally:
        if enabled:
            gc.enable()
