#!/usr/bin/env python3
"""Fills the tables of README.md from result files, so that no figure is typed by hand.

    python bench/readme_tables.py             # rewrites README.md
    python bench/readme_tables.py --check     # exit code 1 if README.md is not what the result files say

A table stands between two comments, the first of which names its result file:

    <!-- table: bench/results/FILE.jsonl -->
    <!-- end of table -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from child import HERE
from result_file import GROUPS, Cell, Row, cells, read
from verdict import TOO_NOISY

ROOT = HERE.parent
README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
NOT_MEASURED = "-"


def filled(text: str) -> str:
    """``text`` with every marked table made from its result file.

    Raises:
        OSError: a result file that a marker names cannot be read.
    """
    return MARKED.sub(lambda found: f"{found[1]}\n{table(cells(read(ROOT / found[2])[1]))}\n\n{found[4]}", text)


def table(found: Sequence[Cell]) -> str:
    """The comparison as Markdown: a row per cell. Columns that no cell has a figure for are left out."""
    columns = [(header, [value(cell) for cell in found]) for header, value in _columns()]
    columns = [(header, values) for header, values in columns if set(values) != {NOT_MEASURED}]
    names = [_name(cell, one_model=len({cell.model for cell in found}) == 1) for cell in found]
    header = "| |" + "".join(f" {header} |" for header, _ in columns)
    lines = [
        "".join(f"| {text} " for text in (name, *(values[i] for _, values in columns))) for i, name in enumerate(names)
    ]
    return "\n".join([header, "|---" * (1 + len(columns)) + "|", *(f"{line}|" for line in lines)])


def _columns() -> list[tuple[str, Callable[[Cell], str]]]:
    """Header and value of each column; all but the first are ratios of ours to the peer."""
    ratios = [
        (f"over {group}", lambda cell, names=names: _ratio(cell.fastest(names))) for group, names in GROUPS.items()
    ]
    return [
        ("images/s", lambda cell: f"{cell.ours['images_per_s']:.0f}"),
        *ratios,
        ("extra memory", lambda cell: _times(cell.rows.get("eager", {}).get("memory_ratio"))),
        ("error", lambda cell: _times(cell.ours["error_ratio_rms"])),
    ]


def _name(cell: Cell, *, one_model: bool) -> str:
    name = f"{cell.dtype}, batch {cell.batch}"
    if not one_model:
        name = f"{cell.arch.upper()} at {cell.size} px, {name}"
    return f"{name}, {cell.limit.upper()}" if cell.limit else name


def _times(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}x"


def _ratio(row: Row | None) -> str:
    """A ratio below 1 is bold: there the peer is faster."""
    if row is None:
        return NOT_MEASURED
    text = _times(row["ratio"])
    text = f"**{text}**" if row["ratio"] < 1 else text
    return f"{text} (noisy)" if row["verdict"] == TOO_NOISY else text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="readme_tables.py", description="Fill README.md's tables from result files.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is out of date")
    options = parser.parse_args(arguments)
    text = README.read_text()
    new = filled(text)
    if options.check:
        if new != text:
            print("README.md is out of date: run python bench/readme_tables.py", file=sys.stderr)
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
