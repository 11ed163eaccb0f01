"""A comparison while it runs: a file that keeps the rows of every finished step, so that an interrupted run can go on.

The first line is the header of the results. Each further line is a finished step with all of its rows. A step counts
once its whole line is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHANGES = ("date", "load", "resumed")
"""What the headers of two parts of one comparison may differ in."""


class JournalError(Exception):
    """The file that is there cannot be used; the text says why and what to do."""


def line(row: dict[str, Any]) -> str:
    """A row as a line of JSON. JSON has no infinity and no NaN (a peer may return them); they become null."""
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """The finished steps of a comparison, in memory and in a file.

    Attributes:
        head: the header row. That of the first part, where a run was resumed.
        finished: rows by step, in the order in which the steps were finished.
    """

    def __init__(self, path: Path, head: dict[str, Any], *, resume: bool = False) -> None:
        """Begin a journal at ``path``, or go on with the one that is there.

        Raises:
            JournalError: there is one, and ``resume`` is not set or the machine, the code or the options differ.
        """
        self.path = path
        self.head = head
        self.finished: dict[str, list[dict[str, Any]]] = {}
        if path.exists():
            if not resume:
                raise JournalError(f"{path} holds an unfinished comparison: go on with --resume, or delete it")
            self._load(head)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The whole file is written again, so that half a line at the end of an interrupted run is gone.
        path.write_text(line(self.head) + "".join(self._step(step) for step in self.finished))

    def _load(self, head: dict[str, Any]) -> None:
        written = [_parsed(text) for text in self.path.read_text().splitlines()]
        if not written or written[0] is None:
            raise JournalError(f"{self.path} has no header: delete it")
        self.head = written[0]
        now = json.loads(line(head))
        differing = sorted(key for key in {*now, *self.head} - set(CHANGES) if self.head.get(key) != now.get(key))
        if differing:
            raise JournalError(f"{self.path} is of another {', '.join(differing)}: delete it, or give another --out")
        self.head["resumed"] = [*self.head.get("resumed", ()), now["date"]]
        self.finished = {found["step"]: found["rows"] for found in written[1:] if found is not None}

    def add(self, step: str, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the rows of a finished step."""
        self.finished[step] = [_finite(row) for row in rows]
        with self.path.open("a") as file:
            file.write(self._step(step))

    def _step(self, step: str) -> str:
        return line({"step": step, "rows": self.finished[step]})

    def finish(self, target: Path, steps: Sequence[str], extra: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Write the result file and delete the journal; returns the rows.

        Args:
            target: the result file. An old one stays until the new one is complete.
            steps: their order in the file, after the header.
            extra: rows after those of the steps.
        """
        rows = [_finite(self.head), *(row for step in steps for row in self.finished.get(step, ())), *extra]
        complete = target.with_name(target.name + ".complete")
        complete.write_text("".join(map(line, rows)))
        complete.replace(target)
        self.path.unlink()
        return rows


def _parsed(text: str) -> dict[str, Any] | None:
    """The line, or None for one that was not written to its end."""
    try:
        return json.loads(text)
    except ValueError:
        return None
