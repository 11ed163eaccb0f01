"""Progress on standard error: a bar where rich is installed and there is a terminal, else a line per step."""

from __future__ import annotations

import sys
import time


class Progress:
    """Steps of known weight (about their seconds), each with a description that may change while it runs."""

    def __init__(self, total: float, enabled: bool = True) -> None:
        self.total, self.done, self.weight = total, 0.0, 0.0
        self.what = ""
        self.start = time.monotonic()
        self._bar = self._task = None
        if enabled and sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return
            columns = (
                progress.BarColumn(bar_width=30), progress.TaskProgressColumn(), progress.TimeElapsedColumn(),
                progress.TextColumn("{task.description}"),
            )  # fmt: skip
            # Redrawn twice a second: what draws it shares the cores with what is measured.
            self._bar = progress.Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()

    def step(self, what: str, weight: float) -> None:
        """End the step before and begin this one."""
        self.done += self.weight
        self.what, self.weight = what, weight
        self.say("")

    def say(self, detail: str) -> None:
        text = f"{self.what}{': ' if detail else ''}{detail}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=text)
        else:
            passed = time.monotonic() - self.start
            print(f"[{self.done / self.total:4.0%}] {passed:5.0f} s  {text}", file=sys.stderr, flush=True)

    def close(self, finished: bool) -> None:
        if self._bar is None:
            return
        if finished:
            self._bar.update(self._task, completed=self.total, description="done")
        self._bar.stop()
