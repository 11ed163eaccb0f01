#!/usr/bin/env python3
"""Fills the tables of README.md from all result files, so that no figure is typed by hand.

    python bench/readme_tables.py             # rewrites README.md
    python bench/readme_tables.py --check     # exit code 1 if README.md is not what the result files say

Between these two comments stands a table for each machine that bench/results has files of, one for each limit on the
instruction set that was measured there, and one for int8:

    <!-- machines -->
    <!-- end of machines -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from child import HERE
from result_file import GROUPS, INT8, OURS, SETS, Cell, Machine, Row, machines, why_not
from verdict import TOO_NOISY

ROOT = HERE.parent
README = ROOT / "README.md"
RESULTS = HERE / "results"
MARKED = re.compile(r"(<!-- machines -->\n)(.*?)(<!-- end of machines -->)", re.DOTALL)
NOT_MEASURED = "-"
INT8_PEERS = {
    "eager_bfloat16": "eager, bfloat16", OURS: "**this engine, int8**", "ours_bfloat16": "this engine, bfloat16",
    "openvino_latency": "OpenVINO, latency", "openvino_throughput": "OpenVINO, throughput",
    "onnxruntime": "ONNX Runtime, static", "torchao_dynamic": "torchao, dynamic, rewritten by hand",
    "torchao_static": "torchao, static, rewritten by hand",
}  # fmt: skip


def filled(text: str) -> str:
    """``text`` with everything between the two comments made from the result files.

    Raises:
        ValueError: the comments are not there.
    """
    if not MARKED.search(text):
        raise ValueError(f"{README.name} has no place for the tables: expected <!-- machines --> and its end")
    parts = [part for machine in machines(sorted(RESULTS.glob("*.jsonl"))) for part in machine_parts(machine)]
    body = "\n\n".join(parts)
    return MARKED.sub(lambda found: f"{found[1]}\n{body}\n\n{found[3]}", text)


def machine_parts(machine: Machine) -> list[str]:
    """Headings and tables of a machine: without a limit, under each limit, and in int8."""
    parts = []
    for limit in machine.limits:
        cells = [cell for cell in machine.cells if cell.limit == limit and cell.dtype != INT8]
        if not cells:
            continue
        if limit is None:
            parts += [f"**{machine.name}**: {_origin(machine)}.", table(cells)]
        else:
            unlimited = "Peers that no switch limits have no column"
            parts += [f"**Limited to {SETS[limit]}** on {machine.name}. {unlimited}.", table(cells)]
    quantised = [cell for cell in machine.cells if cell.dtype == INT8 and cell.limit is None]
    if quantised:
        parts += [f"**int8** on {machine.name}:", int8_table(quantised, machine.accuracy)]
    return parts


def _origin(machine: Machine) -> str:
    """Where the figures are from."""
    versions = list(dict.fromkeys(head["torch"].partition("+")[0] for head, _ in machine.files))
    dates = list(dict.fromkeys(head["date"][:10] for head, _ in machine.files))
    links = [f"[`{name}`](bench/results/{name})" for _, name in machine.files]
    return f"{machine.threads} threads, torch {', '.join(versions)}, {', '.join(dates)}; all rows: {', '.join(links)}"


# ----------------------------------------------------------------------------------------------------------- tables


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column has no heading."""
    head = ["| |" + "".join(f" {column} |" for column in columns), "|---" * (1 + len(columns)) + "|"]
    return "\n".join([*head, *("".join(f"| {text} " for text in line) + "|" for line in lines)])


def table(found: Sequence[Cell]) -> str:
    """The comparison as Markdown: a row per cell. Columns that no cell has a figure for are left out."""
    columns = [(header, [value(cell) for cell in found]) for header, value in _columns()]
    columns = [(header, values) for header, values in columns if set(values) != {NOT_MEASURED}]
    lines = [(_name(cell), *(values[i] for _, values in columns)) for i, cell in enumerate(found)]
    return markdown([header for header, _ in columns], lines)


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


def _name(cell: Cell) -> str:
    return f"{cell.arch.upper()} at {cell.size} px, {cell.dtype}, batch {cell.batch}"


def _times(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}x"


def _ratio(row: Row | None) -> str:
    """A ratio below 1 is bold: there the peer is faster."""
    if row is None or row["ratio"] is None:
        return NOT_MEASURED
    text = _times(row["ratio"])
    text = f"**{text}**" if row["ratio"] < 1 else text
    return f"{text} (noisy)" if row["verdict"] == TOO_NOISY else text


def int8_table(found: Sequence[Cell], accuracy: Sequence[Row]) -> str:
    """int8 as Markdown: a row per peer, with speeds at each batch, ours over it, and errors as multiples of eager's.

    The error of the logits is that of the largest batch.
    """
    model = found[0].model
    found = sorted((cell for cell in found if cell.model == model), key=lambda cell: cell.batch)
    judged = {row["peer"]: row for row in accuracy if (row["arch"], row["size"]) == model[:2]}
    peers = [name for name in INT8_PEERS if name in judged or any(name in cell.rows for cell in found)]
    columns = [f"images/s, batch {cell.batch}" for cell in found]
    offered = any(cell.fastest([OURS]) for cell in found)
    columns += [f"ours over it, batch {cell.batch}" for cell in found] if offered else []
    columns += ["error of logits", "of features", "digits answered as by float64"]
    lines = []
    for name in peers:
        rows = [cell.rows.get(name) for cell in found]
        figures = judged.get(name, {})
        logits = 1.0 if name == "eager_bfloat16" else (rows[-1] or {}).get("error_ratio_rms")
        agreement = figures.get("digits_agreement")
        line = [INT8_PEERS[name], *map(_rate, rows)]
        line += [_ratio(row) for row in rows] if offered else []
        line += [_times(logits), _times(figures.get("error_ratio_rms"))]
        lines.append([*line, NOT_MEASURED if agreement is None else f"{agreement:.1%}"])
    return markdown(columns, lines)


def _rate(row: Row | None) -> str:
    if row is None:
        return NOT_MEASURED
    return why_not(row) if row["images_per_s"] is None else f"{row['images_per_s']:.0f}"


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
