"""What a ratio of times says: faster, slower or even; and when nothing is said, because it would be a guess."""

from __future__ import annotations

from collections.abc import Iterable

from riformer_kernels.timing import Samples, ratio

MOST_SPREAD = 0.25
MOST_ELSEWHERE = 0.25
TOO_NOISY = "too noisy to judge"


def too_noisy(samples: Iterable[Samples], elsewhere: float | None = None) -> bool:
    """Whether any of them scatters too much, or too large a share of the machine was busy ``elsewhere``.

    The second condition is needed because a steady disturbance does not scatter. Measured: another process took one of
    two cores, both threads of a small model shared the other core for seconds, and each of their barriers took a time
    slice.
    """
    return max(found.spread for found in samples) > MOST_SPREAD or (elsewhere or 0.0) > MOST_ELSEWHERE


def verdict(ours: Samples, peer: Samples, elsewhere: float | None = None) -> str:
    """ "faster" or "slower" where 80 % of the rounds say so, else "even"; withheld where it is `too_noisy`."""
    if too_noisy((ours, peer), elsewhere):
        return TOO_NOISY
    found = ratio(ours, peer)
    return "faster" if found.p20 > 1 else "slower" if found.p80 < 1 else "even"
