"""Times of several ways to compute the same thing, taken in turn so that a busy moment of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of one contender, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def speedup_over(self, other: Times) -> float:
        """How many times faster than ``other``: the median over the rounds, so that only neighbours are compared."""
        return statistics.median(theirs / mine for theirs, mine in zip(other.seconds, self.seconds, strict=True))

    def per_item(self, items: int) -> str:
        """Median milliseconds per item with the spread, as text."""
        milliseconds = 1e3 * self.median / items
        return f"{milliseconds:{'.3g' if milliseconds < 1000 else ',.0f'}} ±{self.spread:.0%}"


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, budget: float, least: int = 3
) -> dict[str, Times]:
    """Times of each contender after one call to warm up; every round calls each once, in an order that rotates.

    ``rounds`` at most, fewer (but ``least``) when ``budget`` seconds have passed.
    """
    for function in contenders.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order, start = list(contenders), time.perf_counter()
    for index in range(rounds):
        if index >= least and time.perf_counter() - start > budget:
            break
        for name in order:
            begin = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - begin)
        order = order[1:] + order[:1]
    return {name: Times(tuple(values)) for name, values in seconds.items()}
