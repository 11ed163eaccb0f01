#!/usr/bin/env python3
"""All machines in one small picture: this engine's speed over that of the best peer, for each dtype and batch.

    python bench/machines.py [FOLDER]        # default: bench/results

Writes FOLDER/machines.svg, made from the result files there alone: the same bytes for the same files. A dot is the
median of the rounds' ratios and its line goes from the 20th to the 80th percentile. Where a machine was limited to less
than it has, the line says so: a limited machine is no machine of that kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import svg
from child import HERE
from result_file import FLOATS, INT8, SETS, Cell, Machine, Row, is_noisy, machines

RESULTS = HERE / "results"
MODEL = ("s12", 224)
# Lengths are in pixels.
WIDTH, MARGIN, NAMES, LABELS = 860, 16, 300, 170
HEAD, FOOT, TITLE, STEP, GAP = 50, 52, 26, 20, 12
RADIUS = 4
LEAST, MOST = 0.5, 1.5
"""The ratios at the ends of the axis, unless one lies beyond."""
PEERS = {
    "openvino_latency": "OpenVINO", "openvino_throughput": "OpenVINO", "onnxruntime": "ONNX Runtime",
    "compile": "torch.compile", "compile_linear": "torch.compile, rewritten", "eager": "eager",
    "eager_channels_last": "eager", "eager_linear": "eager, rewritten", "torchao_dynamic": "torchao",
    "torchao_static": "torchao",
}  # fmt: skip


def lines(found: Sequence[Machine], dtype: str) -> list[tuple[str, Cell, Row]]:
    """Name, cell and best peer of every line of a panel: machine by machine, what is limited after what is not."""
    made = []
    for machine in found:
        for limit in machine.limits:
            for cell in machine.cells:
                if (cell.arch, cell.size, cell.dtype, cell.limit) != (*MODEL, dtype, limit):
                    continue
                best = cell.best_peer
                if best is not None and best["ratio"] is not None:
                    within = machine.name if limit is None else f"limited to {SETS[limit]} on {machine.cpu}"
                    made.append((f"{within}, batch {cell.batch}", cell, best))
    return made


def picture(found: Sequence[Machine]) -> str | None:
    """The SVG: a panel for each dtype; None where no machine has rows of ``MODEL``."""
    panels = {dtype: lines(found, dtype) for dtype in (*FLOATS, INT8)}
    panels = {dtype: made for dtype, made in panels.items() if made}
    if not panels:
        return None
    ends = [row[key] for made in panels.values() for _, _, row in made for key in ("ratio_p20", "ratio_p80")]
    low, high = min(LEAST, *ends), max(MOST, *ends)

    def at(ratio: float) -> float:
        return MARGIN + NAMES + (WIDTH - 2 * MARGIN - NAMES - LABELS) * (ratio - low) / (high - low)

    count = len(found)
    subtitle = "1 machine so far: nothing is known of others" if count == 1 else f"{count} machines"
    title = f"{MODEL[0].upper()} at {MODEL[1]} px: this engine's speed over that of the best peer"
    parts = [svg.text(MARGIN, 24, title, size=16, bold=True), svg.text(MARGIN, 42, subtitle, colour=svg.FAINT, size=12)]
    y = HEAD
    for dtype, made in panels.items():
        parts.append(svg.text(MARGIN, y + 16, dtype, bold=True))
        bottom = y + TITLE + STEP * len(made)
        parts.append(
            f'<line x1="{at(1):.1f}" y1="{y + TITLE - 6}" x2="{at(1):.1f}" y2="{bottom - 4}" stroke="{svg.GREY}"/>'
        )
        for index, (name, _, row) in enumerate(made):
            parts += _line(name, row, at, y + TITLE + STEP * index + STEP // 2)
        y = bottom + GAP
    ahead = "right of the line this engine is faster; hollow: too noisy to judge"
    parts.append(svg.text(at(1), y + 10, "1", colour=svg.FAINT, size=12, anchor="middle"))
    parts.append(svg.text(MARGIN, y + 28, ahead, colour=svg.FAINT, size=12))
    return svg.document(WIDTH, y + FOOT - GAP, parts)


def _line(name: str, row: Row, at: Callable[[float], float], y: int) -> list[str]:
    left, middle, right = (at(row[key]) for key in ("ratio_p20", "ratio", "ratio_p80"))
    fill = "white" if is_noisy(row) else svg.BLUE
    label = f"{row['ratio']:.2f}x {PEERS.get(row['peer'], row['peer'])}"
    return [
        svg.text(MARGIN + NAMES - 12, y + 4, name, size=12, anchor="end"),
        f'<line x1="{left:.1f}" y1="{y}" x2="{right:.1f}" y2="{y}" stroke="{svg.BLUE}" stroke-width="2"/>',
        f'<circle cx="{middle:.1f}" cy="{y}" r="{RADIUS}" fill="{fill}" stroke="{svg.BLUE}"/>',
        svg.text(WIDTH - MARGIN - LABELS + 12, y + 4, label, size=12),
    ]


def draw(folder: Path = RESULTS, to: Path | None = None) -> Path | None:
    """Write ``machines.svg``; None where there are no rows for it."""
    drawn = picture(machines(sorted(folder.glob("*.jsonl"))))
    if drawn is None:
        return None
    target = (to or folder) / "machines.svg"
    target.write_text(drawn)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    drawn = draw(*map(Path, arguments[:1]))
    print(drawn or "no picture: no result file has rows of the model")
    return int(drawn is None)


if __name__ == "__main__":
    sys.exit(main())
