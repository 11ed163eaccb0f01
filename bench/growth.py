"""How the cost grows: ours alone over image sizes, batch sizes and threads, compared with what was promised.

Each axis gives a row per point and one with the finding. The points of an axis take turns, each in a worker of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from verdict import TOO_NOISY, too_noisy
from worker import Worker, take_turns

from riformer_kernels.backends import cpu
from riformer_kernels.timing import Samples, ratio

SIZES, BATCHES = (224, 384, 512, 768, 1024), (1, 2, 4, 8, 16, 32, 64)
WITHIN, LEAST_SPEEDUP = 0.15, 1.8
MET, MISSED = "met", "missed"


@dataclass(frozen=True)
class Finding:
    """What the points of an axis say: a figure, its limit, and whether it is met; ``text`` says it with its unit."""

    value: float
    limit: float
    met: bool
    text: str


def size_finding(images_per_s: Mapping[int, float]) -> Finding:
    """Flat in the image's area: megapixels/s at the slowest size at most 15 % below those at the fastest.

    Args:
        images_per_s: by side in pixels; several.
    """
    rates = {size: rate * size**2 / 1e6 for size, rate in images_per_s.items()}
    low, high = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    below = 1 - rates[low] / rates[high]
    text = (
        f"{rates[low]:.3g} megapixels/s at {low} px are {below:.0%} below the {rates[high]:.3g} at {high} px "
        f"(at most {WITHIN:.0%} promised)"
    )
    return Finding(below, WITHIN, below <= WITHIN, text)


def batch_finding(seconds: Mapping[int, float]) -> Finding:
    """Linear in the batch: every time within 15 % of the line through them (least squares of relative errors).

    Args:
        seconds: of one call, by batch; at least three.
    """
    # Minimise the sum of (fixed + each n - t)^2 / t^2: two unknowns, weights 1 / t^2.
    ones = sum(t**-2 for t in seconds.values())
    n1 = sum(n / t**2 for n, t in seconds.items())
    n2 = sum((n / t) ** 2 for n, t in seconds.items())
    t1 = sum(1 / t for t in seconds.values())
    nt = sum(n / t for n, t in seconds.items())
    each = (ones * nt - n1 * t1) / (ones * n2 - n1**2)
    fixed = (t1 - n1 * each) / ones
    off = {n: (fixed + each * n) / t - 1 for n, t in seconds.items()}
    worst = max(off, key=lambda n: abs(off[n]))
    text = (
        f"{1e3 * fixed:.2g} ms and {1e3 * each:.3g} ms per image; batch {worst} is {abs(off[worst]):.0%} off that line "
        f"(at most {WITHIN:.0%} promised)"
    )
    return Finding(abs(off[worst]), WITHIN, abs(off[worst]) <= WITHIN, text)


def threads_finding(speedup: float) -> Finding:
    """Two threads at least 1.8 times as fast as one."""
    text = f"{speedup:.2f}x as fast with 2 threads as with one (at least {LEAST_SPEEDUP:g}x promised)"
    return Finding(speedup, LEAST_SPEEDUP, speedup >= LEAST_SPEEDUP, text)


def judged(finding: Finding, samples: Mapping[Any, Samples], elsewhere: float | None) -> str:
    """The verdict; withheld where the points are too noisy for it."""
    if too_noisy(samples.values(), elsewhere):
        return TOO_NOISY
    return MET if finding.met else MISSED


def too_few(cores: int, threads: int) -> str | None:
    """Why nothing can be said about two threads here, or None."""
    if min(cores, threads) >= 2:
        return None
    return (
        f"withheld: {cores} core{'s' * (cores != 1)} and {threads} thread{'s' * (threads != 1)}, two of each are needed"
    )


# ------------------------------------------------------------------------------------------------------------- rows


def rows(
    axis: str,
    arch: Any,
    dtype: torch.dtype,
    *,
    cores: int,
    seconds: float,
    sizes: tuple[int, ...] = SIZES,
    batches: tuple[int, ...] = BATCHES,
    size: int = 224,
    batch: int = 16,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """The points along ``axis`` and the finding.

    Args:
        axis: "size" (at ``batch``), "batch" (at ``size``) or "threads" (at both).
        cores: that this process may use.
        seconds: of measuring, for each point.
        progress: gets a line before each step.
    """
    threads = torch.get_num_threads()
    name = str(dtype).removeprefix("torch.")
    points: dict[int, tuple[int, int, int]] = {
        "size": {value: (value, batch, threads) for value in sizes},
        "batch": {value: (size, value, threads) for value in batches},
        "threads": {value: (size, batch, value) for value in dict.fromkeys((1, 2, threads))},
    }[axis]
    common = {
        "arch": arch if isinstance(arch, str) else "custom", "dtype": name, "device": "cpu", "axis": axis,
        "isa": cpu.isa_status()["chosen"],
    }  # fmt: skip
    withheld = too_few(cores, threads) if axis == "threads" else None
    times: dict[str, Samples] = {}
    elsewhere = None
    if withheld is None:
        with ExitStack() as stack:
            workers = {}
            for value, (side, images, count) in points.items():
                progress(f"starting {axis} {value}")
                arguments = {"arch": arch, "size": side, "batch": images, "dtype": name}
                workers[value] = stack.enter_context(
                    Worker(f"{axis} {value}", "peers:serve_ours", arguments, threads=count)
                )
            progress(f"timing {len(workers)} points")
            times, elsewhere = take_turns(workers, seconds * len(workers))
    found = [
        {
            "kind": "growth", **common, "value": value, "size": side, "batch": images, "threads": count,
            "rounds": times[value].rounds, "ms": 1e3 * times[value].median, "ms_p20": 1e3 * times[value].p20,
            "ms_p80": 1e3 * times[value].p80, "spread": times[value].spread,
            "images_per_s": images / times[value].median,
            "megapixels_per_s": images * side**2 / 1e6 / times[value].median, "elsewhere": elsewhere,
        }
        for value, (side, images, count) in points.items()
        if value in times
    ]  # fmt: skip
    fixed = {
        key: None if key == axis else value for key, value in (("size", size), ("batch", batch), ("threads", threads))
    }
    head = {"kind": "growth_verdict", **common, **fixed}
    if withheld is not None:
        return [{**head, "value": None, "limit": LEAST_SPEEDUP, "text": None, "verdict": withheld}]
    finding = _finding(axis, points, times)
    verdict = judged(finding, times, elsewhere)
    return [*found, {**head, "value": finding.value, "limit": finding.limit, "text": finding.text, "verdict": verdict}]


def _finding(axis: str, points: Mapping[int, tuple[int, int, int]], times: Mapping[int, Samples]) -> Finding:
    if axis == "size":
        return size_finding({value: points[value][1] / samples.median for value, samples in times.items()})
    if axis == "batch":
        return batch_finding({value: samples.median for value, samples in times.items()})
    return threads_finding(ratio(times[2], times[1]).median)
