"""Whether the instruction set that is chosen by itself is the fastest of those that the machine has.

The order of choice stands in `csrc/cpu/instruction_sets.def`, and it is the same on every processor. A processor on
which another set is faster would be served badly without anybody noticing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import isa
from verdict import MOST_SPREAD

from riformer_kernels.backends import cpu
from riformer_kernels.timing import SHORTEST_SAMPLE, Ratio, Samples, ratio, rotate

LEAST = 0.95
"""How much slower the chosen set may be. Two sets that run the same instructions (avx512 and avx512_bf16 in float32)
were 0.94 to 1.02 times as fast as each other in five measurements of 4 seconds on a shared machine. So one measurement
alone decides nothing either (`judged`)."""


def automatic() -> tuple[str, list[str]]:
    """The instruction set that the library chooses by itself, and all of the processor's that it can choose from."""
    with selecting():
        cpu.select_isa("")
        return cpu.isa_status()["chosen"], list(isa.up_to(isa.best()))


def ratios(times: Mapping[str, Samples], chosen: str) -> dict[str, Ratio]:
    """Speed of the chosen set over each other one."""
    return {name: ratio(times[chosen], samples) for name, samples in times.items() if name != chosen}


def findings(found: Mapping[str, Ratio], chosen: str) -> list[str]:
    """Each set that is faster than the chosen one, as a sentence; empty where none is.

    Faster: by more than ``LEAST`` allows in the median of the rounds, and in 80 % of the rounds at all.
    """
    return [
        f"{chosen} is chosen, but only {speed.median:.2f}x as fast as {name} "
        f"({speed.p20:.2f}..{speed.p80:.2f}, at least {LEAST:g} expected)"
        for name, speed in found.items()
        if speed.median < LEAST and speed.p80 < 1
    ]


def noisy(found: Mapping[str, Ratio]) -> bool:
    """Whether the ratios scatter too much. The times may: a slow minute slows all sets, and the ratios stay."""
    return any((speed.p80 - speed.p20) / speed.median > MOST_SPREAD for speed in found.values())


def judged(measure: Callable[[], Mapping[str, Ratio]], chosen: str, attempts: int = 3) -> list[str] | None:
    """`findings` that two measurements agree on; None where the machine was too noisy for that.

    A disturbance may favour one set in one measurement. A set that is really faster is so in the next as well.
    """
    before: list[str] | None = None
    for _ in range(attempts):
        speeds = measure()
        if noisy(speeds):
            continue
        found = findings(speeds, chosen)
        if not found or before is not None:
            return found
        before = found
    return None


@contextmanager
def selecting() -> Iterator[None]:
    """Inside the block instruction sets may be selected; after it the one from before holds again."""
    before = cpu.isa_status()["chosen"]
    try:
        yield
    finally:
        cpu.select_isa(before)


def samples(call: Callable[[], object], names: list[str], seconds: float) -> dict[str, Samples]:
    """``call`` with each of the sets, in turns. The first call after each change is not timed: it finds caches and
    working memory as the other set left them."""

    def sampler(name: str) -> Callable[[int], float]:
        def sample(calls: int) -> float:
            cpu.select_isa(name)
            call()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls

        return sample

    with selecting():
        samplers = {name: sampler(name) for name in names}
        return rotate(samplers, seconds * len(names), shortest=20 * SHORTEST_SAMPLE)
