"""Where the commands' words go: tables and documents to stdout, progress and complaints to stderr.

rich draws tables and progress on a terminal, if it is installed; everywhere else the text is plain and has no escape
codes. With NO_COLOR set (to anything but nothing) tables are plain on a terminal too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO


class CliError(Exception):
    """An error for the user: one clear line, no traceback. ``code`` is the exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def printable(text: str) -> str:
    """``text`` with control characters escaped: a file's name must not command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def report_error(message: str) -> None:
    """Print an error to stderr. Line breaks are kept, other control characters are not."""
    lines = [printable(line) for line in message.splitlines()]
    print(f"riformer-kernels: error: {chr(10).join(lines)}", file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Print a remark to stderr."""
    print(f"riformer-kernels: {printable(message)}", file=sys.stderr, flush=True)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person reads ``stream`` as it is written."""
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def _rich_for(stream: TextIO) -> bool:
    if not is_terminal(stream) or os.environ.get("TERM", "") in ("", "dumb"):
        return False
    try:
        import rich.console  # noqa: F401
    except ImportError:
        return False
    return True


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", right: Sequence[int] = ()) -> None:
    """Print a table to stdout. ``right``: indices of the columns that are aligned to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if _rich_for(sys.stdout) and not os.environ.get("NO_COLOR"):
        _rich_table(header, rows, title, right)
        return
    if title:
        print(title)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _rich_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str, right: Sequence[int]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        drawn.add_column(Text(name), justify="right" if index in right else "left", overflow="fold")
    styles = {"passed": "green", "yes": "green", "FAILED": "bold red", "no": "yellow"}
    for row in rows:
        # Text, not markup: "[b]" may be part of a file's name.
        drawn.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    Console(file=sys.stdout).print(drawn)


def document(data: Any) -> None:
    """Print one JSON document. What JSON has no number for (infinity, NaN) becomes null."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextlib.contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Show progress on stderr if that is a terminal, otherwise nothing.

    Yields ``advance(count=1, description=None)``. ``total`` None: only that something is going on.
    """
    if not is_terminal(sys.stderr):
        yield lambda count=1, description=None: None
    elif _rich_for(sys.stderr):
        with _rich_progress() as bar:
            task = bar.add_task(description, total=total)
            yield lambda count=1, description=None: bar.update(
                task, advance=count, **({} if description is None else {"description": description})
            )
    else:
        yield from _plain_progress(description, total)


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr, no_color=True if os.environ.get("NO_COLOR") else None)
    return Progress(*columns, console=console, transient=True)


def _plain_progress(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """One line that is written over; only carriage returns and spaces."""
    done, width, label = 0, 0, description

    def show(text: str) -> None:
        nonlocal width
        print("\r" + text.ljust(width), end="", file=sys.stderr, flush=True)
        width = len(text)

    def advance(count: int = 1, description: str | None = None) -> None:
        nonlocal done, label
        done += count
        label = description or label
        show(f"{label} {done}" + (f"/{total}" if total is not None else ""))

    advance(0)
    try:
        yield advance
    finally:
        show("")
        print("\r", end="", file=sys.stderr, flush=True)
