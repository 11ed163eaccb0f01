#!/usr/bin/env python3
"""The summary of a result file as one small picture: images per second, ours and each peer's, for the main model.

    python bench/summary.py bench/results/FILE.jsonl [--to FOLDER]

Writes FILE-summary.svg. The picture is text and rectangles, made from the file alone: a few kilobytes, and the same
bytes for the same file. int8 has a table of its own in README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import svg
from result_file import INT8, OURS, SETS, Cell, Row, cells, is_noisy, machine_name, read, why_not

BARS = {
    "riformer_kernels": (OURS,),
    "OpenVINO": ("openvino_latency", "openvino_throughput"),
    "torch.compile": ("compile",),
    "ONNX Runtime": ("onnxruntime",),
    "PyTorch eager": ("eager", "eager_channels_last"),
}
"""The bars of a panel, by the name beside them; of several modes or layouts the faster one is shown."""

# Lengths are in pixels.
WIDTH, MARGIN, NAMES, GAP = 860, 16, 134, 28
HEAD, FOOT, TITLE, BAR, STEP, PANEL_GAP = 50, 26, 24, 16, 22, 14
FIGURES = 76
"""Room behind the longest bar for its figure."""


def picture(head: Row, rows: Sequence[Row]) -> str | None:
    """The SVG: a panel for each dtype and batch of the first model of the file; None without such rows."""
    found = cells(rows)
    shown = [cell for cell in found if cell.model == found[0].model and cell.dtype != INT8]
    if not shown or any(cell.fastest([OURS]) is None for cell in shown):
        return None
    names = [name for name, peers in BARS.items() if any(cell.fastest(peers) for cell in shown)]
    dtypes = list(dict.fromkeys(cell.dtype for cell in shown))
    batches = sorted({cell.batch for cell in shown})
    panel_width = (WIDTH - 2 * MARGIN - NAMES - GAP * (len(batches) - 1)) / len(batches)
    panel_height = TITLE + STEP * len(names)
    height = HEAD + FOOT + len(dtypes) * panel_height + (len(dtypes) - 1) * PANEL_GAP
    within = f", everybody limited to {SETS[shown[0].limit]}" if shown[0].limit else ""
    title = f"{shown[0].arch.upper()} at {shown[0].size} px: images per second{within}"
    parts = [
        svg.text(MARGIN, 24, title, size=16, bold=True),
        svg.text(MARGIN, 42, machine_name(head), colour=svg.FAINT, size=12),
    ]
    for i, dtype in enumerate(dtypes):
        top = HEAD + i * (panel_height + PANEL_GAP)
        for j, name in enumerate(names):
            y = top + TITLE + j * STEP + BAR - 4
            parts.append(svg.text(MARGIN + NAMES - 8, y, name, anchor="end", bold=name == "riformer_kernels"))
        for j, batch in enumerate(batches):
            cell = next((cell for cell in shown if (cell.dtype, cell.batch) == (dtype, batch)), None)
            if cell is not None:
                parts += _panel(cell, names, MARGIN + NAMES + j * (panel_width + GAP), top, panel_width)
    note = "Medians, taken in turns. Of OpenVINO's modes and of eager's layouts, the faster one."
    return svg.document(WIDTH, height, [*parts, svg.text(MARGIN, height - 10, note, colour=svg.FAINT, size=12)])


def _panel(cell: Cell, names: Sequence[str], left: float, top: float, width: float) -> list[str]:
    """Title, bars and figures of one dtype and batch."""
    fastest = {name: cell.fastest(BARS[name]) for name in names}
    most = max(row["images_per_s"] for row in fastest.values() if row is not None)
    parts = [svg.text(left, top + 16, f"{cell.dtype}, batch {cell.batch}", colour=svg.FAINT)]
    for i, (name, row) in enumerate(fastest.items()):
        y = top + TITLE + i * STEP
        if row is None:
            reason = next((why_not(cell.rows[peer]) for peer in BARS[name] if peer in cell.rows), "not measured")
            parts.append(svg.text(left + 4, y + BAR - 4, reason, colour=svg.FAINT, size=12))
            continue
        length = (width - FIGURES) * row["images_per_s"] / most
        ours = row["peer"] == OURS
        fill = svg.BLUE if ours else svg.GREY
        parts.append(f'<rect x="{left:.1f}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{fill}"/>')
        figure = f"{row['images_per_s']:.0f}" + (" (noisy)" if is_noisy(row) else "")
        parts.append(svg.text(left + length + 6, y + BAR - 4, figure, bold=ours))
    return parts


def draw(path: Path, folder: Path | None = None) -> Path | None:
    """Write ``<name>-summary.svg`` into ``folder`` (default: beside the file); None where there are no rows for it."""
    drawn = picture(*read(path))
    if drawn is None:
        return None
    target = (folder or path.parent) / f"{path.stem}-summary.svg"
    target.write_text(drawn)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="summary.py", description="Draw the summary of a result file.")
    parser.add_argument("results", type=Path, metavar="FILE")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: beside the file")
    options = parser.parse_args(arguments)
    drawn = draw(options.results, options.to)
    print(drawn or "no picture: the file has no rows of a model")
    return int(drawn is None)


if __name__ == "__main__":
    sys.exit(main())
