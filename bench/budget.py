"""A limit on the time of many steps together: what would not be finished is not begun, or it is stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")
CLEANING_UP = 15.0
"""Seconds that are kept for ending the processes of a step that is stopped."""


class OutOfTimeError(Exception):
    """There is no time left for a step; the text says whether it was begun."""


class Budget:
    """Time for steps of known weight. A weight is about the step's seconds on a machine that does nothing else."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """``seconds``: for all steps together; None for no limit."""
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds - CLEANING_UP
        self._weight = self._spent = 0.0

    def run(self, weight: float, step: Callable[[], Result]) -> Result:
        """Call ``step``.

        Raises:
            OutOfTimeError: at the pace of the steps before, it would not be finished in time; or it was not.
        """
        start = self._clock()
        pace = max(1.0, self._spent / self._weight) if self._weight else 1.0
        if self._end is not None and start + pace * weight > self._end:
            raise OutOfTimeError("no time left")
        with _stopped_after(None if self._end is None else self._end - start):
            found = step()
        self._spent += self._clock() - start
        self._weight += weight
        return found


@contextmanager
def _stopped_after(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTimeError inside the block once ``seconds`` have passed; None for never."""
    if seconds is None:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise OutOfTimeError("not finished in time")

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    before, interval = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        # Whoever had set the timer gets it back, with what is left of its time.
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, before - (time.monotonic() - start)), interval)
