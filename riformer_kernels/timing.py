"""Timing several ways to compute the same thing, in turns.

Absolute times on a shared machine mean little. So everything that is compared takes turns: each round takes one sample
of each, and the order rotates from round to round. A ratio is the median of the ratios of the rounds, so that a
disturbance that lasts longer than a round cancels out.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SHORTEST_SAMPLE = 1e-3
"""Seconds. Calls that are shorter are repeated until a sample takes this long: the clock could not resolve one call."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie, interpolated between neighbours."""
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
    """How many times as fast ours is: median, 20th and 80th percentile of the ratios of the rounds."""

    median: float
    p20: float
    p80: float


def ratio(ours: Samples, peer: Samples) -> Ratio:
    """Speed of ours over that of the peer, above 1 when ours is faster; both from the same rounds."""
    if ours.rounds != peer.rounds:
        raise ValueError(f"not from the same rounds: {ours.rounds} rounds against {peer.rounds}")
    pairs = [theirs / mine for mine, theirs in zip(ours.seconds, peer.seconds, strict=True)]
    return Ratio(percentile(pairs, 0.5), percentile(pairs, 0.2), percentile(pairs, 0.8))


def rotate(
    samplers: Mapping[str, Callable[[int], float]],
    seconds: float,
    min_rounds: int = 5,
    warmup: int = 2,
    *,
    max_rounds: int | None = None,
    shortest: float = SHORTEST_SAMPLE,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Take samples in rounds, one of each per round.

    The order rotates by one each round. Otherwise the same one would always run after the same other one, on what
    that one left in the caches. Exceptions pass through: call a function that may fail once before.

    Args:
        samplers: by name. Each makes as many calls in a row as it is told to and returns the seconds of one call.
        seconds: for all rounds together. The round that passes this time is finished.
        min_rounds: that many at least, however long they take.
        warmup: samples of one call of each before the rounds. They decide only how many calls a sample has.
        max_rounds: that many at most; None for as many as fit into ``seconds``.
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
    while names and (rounds < min_rounds or clock() < until) and rounds != max_rounds:
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
    max_rounds: int | None = None,
    shortest: float = SHORTEST_SAMPLE,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """`rotate` for functions of this process. The garbage collector rests meanwhile.

    The functions should share one pool of threads: two pools in one process take each other's cores.

    Args:
        synchronize: waits for the device (``torch.cuda.synchronize``); called before each reading of the clock.
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
        return rotate(samplers, seconds, min_rounds, warmup, max_rounds=max_rounds, shortest=shortest, clock=clock)
    finally:
        if enabled:
            gc.enable()
