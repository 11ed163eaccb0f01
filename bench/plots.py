#!/usr/bin/env python3
"""The two plots of a result file, as SVG beside it: the peers' throughput, and the roofline with S12's stages on it.

    python bench/plots.py bench/results/FILE.jsonl [--to FOLDER] [--png]

Made from the file alone, and the same bytes for the same file and matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import peak
from plot_labels import write_names
from result_file import INT8, is_noisy, machine_name, read, why_not

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

# Okabe and Ito's palette, which colour-blind people can tell apart; ours is also the only saturated bar.
OURS, UNCHANGED, REWRITTEN = "#0072b2", "#b3b3b3", "#e3c9a0"
DTYPES = {"float32": "#d55e00", "bfloat16": "#0072b2", "float16": "#009e73"}
TEXT = "#333333"
STYLE = {
    "svg.hashsalt": "riformer_kernels", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9,
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": "#888888", "axes.linewidth": 0.8,
    "xtick.color": TEXT, "ytick.color": TEXT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 9.5, "figure.facecolor": "white",
}  # fmt: skip
LABELS = {
    "ours": "riformer_kernels", "eager": "PyTorch eager", "eager_channels_last": "eager, channels_last",
    "eager_linear": "eager, rewritten by hand", "compile": "torch.compile",
    "compile_linear": "torch.compile, rewritten by hand", "openvino_latency": "OpenVINO, latency",
    "openvino_throughput": "OpenVINO, throughput", "onnxruntime": "ONNX Runtime",
}  # fmt: skip
WIDTH = 8.6  # inches; a README shows it at about 860 pixels


# ------------------------------------------------------------------------------------------------------- throughput


def throughput(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> pyplot.Figure | None:
    """Bars of images/s with the 20th and 80th percentile, a panel per dtype and batch of the main cells.

    None where the file has no such rows.
    """
    models = [row for row in rows if row["kind"] == "model" and row["dtype"] != INT8 and not row.get("isa_limit")]
    if not models:
        return None
    arch, size = models[0]["arch"], models[0]["size"]
    models = [row for row in models if (row["arch"], row["size"]) == (arch, size)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in models))
    batches = list(dict.fromkeys(row["batch"] for row in models))
    names = [name for name in LABELS if any(row["peer"] == name for row in models)]
    figure, axes = pyplot.subplots(
        len(dtypes), len(batches), squeeze=False, sharey=True, layout="constrained",
        figsize=(WIDTH, len(dtypes) * (0.27 * len(names) + 0.75) + 0.35),
    )  # fmt: skip
    for i, dtype in enumerate(dtypes):
        for j, batch in enumerate(batches):
            cell = {row["peer"]: row for row in models if (row["dtype"], row["batch"]) == (dtype, batch)}
            _bars(axes[i, j], names, cell, f"{dtype}, batch {batch}")
            if i == len(dtypes) - 1:
                axes[i, j].set_xlabel("images/s (median; line: 20th to 80th percentile)")
    figure.suptitle(
        f"{str(arch).upper()} at {size} px, images to logits\n{machine_name(head)}", x=0.01, ha="left", fontsize=9.5
    )
    return figure


def _bars(axis: pyplot.Axes, names: Sequence[str], cell: dict[str, dict[str, Any]], title: str) -> None:
    measured = [row["images_per_s_p80"] for row in cell.values() if row["images_per_s"] is not None]
    most = max(measured, default=1.0)
    for at, name in enumerate(names):
        row = cell.get(name)
        if row is None:
            continue
        rate = row["images_per_s"]
        if rate is None:
            axis.text(0.01 * most, at, why_not(row), va="center", fontsize=8, color="#777777", style="italic")
            continue
        colour = OURS if name == "ours" else REWRITTEN if row["form"] == "rewritten" else UNCHANGED
        axis.barh(at, rate, height=0.72, color=colour)
        low, high = row["images_per_s_p20"], row["images_per_s_p80"]
        axis.plot([low, high], [at, at], color=TEXT, linewidth=1.2, solid_capstyle="butt")
        noisy = " (noisy)" if is_noisy(row) else ""
        bold = "bold" if name == "ours" else "normal"
        axis.text(high + 0.015 * most, at, f"{rate:.0f}{noisy}", va="center", fontsize=8.5, fontweight=bold)
    axis.set_xlim(0, 1.16 * most)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set_title(title, loc="left")


# --------------------------------------------------------------------------------------------------------- roofline

MARKS = {"stem": "v", "stage": "o", "downsampling": "s", "head": "D"}


def roofline(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> pyplot.Figure | None:
    """Arithmetic rate of each stage over its arithmetic intensity, under the measured roofs; None without stages.

    A panel per dtype, at the largest batch; intensity is FLOP over the least bytes that have to be moved.
    """
    stages = [row for row in rows if row["kind"] == "op" and row["peer"] == "ours" and row.get("stage")]
    if not stages:
        return None
    batch = max(row["batch"] for row in stages)
    stages = [row for row in stages if row["batch"] == batch]
    dtypes = list(dict.fromkeys(row["dtype"] for row in stages))
    figure, axes = pyplot.subplots(
        1, len(dtypes), squeeze=False, sharey=True, sharex=True, figsize=(WIDTH, 4.1), layout="constrained"
    )
    threads = stages[0]["threads"]
    bandwidth = peak.bandwidth(rows, threads)
    ceilings = {dtype: peak.ceiling(rows, dtype, head["isa"], threads) for dtype in dtypes}
    x = [row["flop_per_byte"] for row in stages]
    ridges = [value / bandwidth for value in ceilings.values() if value and bandwidth]
    left = min(min(x) / 2, *(ridge / 12 for ridge in ridges)) if ridges else min(x) / 2  # room for the slope's name
    y = [*(row["gflop_per_s"] for row in stages), *(value / 1e9 for value in ceilings.values() if value)]
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        axis.set(xscale="log", yscale="log", xlim=(left, max(x) * 2), ylim=(min(y) / 1.8, max(y) * 1.8))
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter(ScalarFormatter())
            side.set_minor_locator(NullLocator())
        axis.grid(color="#ececec", linewidth=0.6)
        axis.set_axisbelow(True)
        _roof(axis, ceilings[dtype], bandwidth)
        cell = [row for row in stages if row["dtype"] == dtype]
        for row in cell:
            colour = DTYPES[dtype]
            axis.plot(row["flop_per_byte"], row["gflop_per_s"], MARKS[row["stage"].partition(" ")[0]], markersize=6.5,
                      color=colour, markerfacecolor="white" if is_noisy(row) else colour)  # fmt: skip
        hollow = ", hollow: too noisy to judge" if any(map(is_noisy, cell)) else ""
        axis.set_title(f"{dtype}, batch {batch}{hollow}", loc="left")
        axis.set_xlabel("FLOP per byte that has to be moved")
    axes[0, 0].set_ylabel("GFLOP/s")
    figure.suptitle(
        f"S12 at 224 px, every stage under the ceilings measured in the same run\n{machine_name(head)}",
        x=0.01,
        ha="left",
        fontsize=9.5,
    )
    figure.draw_without_rendering()  # the layout is final: names are placed by where the points are on paper
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        cell = [row for row in stages if row["dtype"] == dtype]
        points = [
            (row["stage"].replace("downsampling", "down"), row["flop_per_byte"], row["gflop_per_s"]) for row in cell
        ]
        write_names(axis, points, ceilings[dtype] / 1e9 if ceilings[dtype] else None)
    return figure


def _roof(axis: pyplot.Axes, ceiling: float | None, bandwidth: float | None) -> None:
    """The two lines that nothing can be above: FLOP/s, and bytes/s times the FLOP that each of them makes possible."""
    left, right = axis.get_xlim()
    if ceiling:
        start = max(left, ceiling / bandwidth) if bandwidth else left
        axis.plot([start, right], 2 * [ceiling / 1e9], color=TEXT, linewidth=1.3)
        axis.annotate(
            f"{ceiling / 1e9:,.0f} GFLOP/s", (right, ceiling / 1e9), (-3, 4), textcoords="offset points", ha="right"
        )
    if bandwidth:
        end = min(right, ceiling / bandwidth) if ceiling else right
        if end > left:
            axis.plot([left, end], [bandwidth * left / 1e9, bandwidth * end / 1e9], color=TEXT, linewidth=1.3)
        # Above the line, where no stage can be.
        at = left * (max(left, end) / left) ** 0.7
        name, place = f"copy {bandwidth / 1e9:.0f} GB/s", (at, bandwidth * at / 1e9)
        axis.annotate(name, place, (-5, 2), textcoords="offset points", ha="right")


# ------------------------------------------------------------------------------------------------------------- main

PLOTS = {"throughput": throughput, "roofline": roofline}


def draw(path: Path, folder: Path | None = None, kind: str = "svg") -> list[Path]:
    """Write ``<name>-throughput.svg`` and ``<name>-roofline.svg``; those that the file has rows for.

    Args:
        path: of the result file.
        folder: where to; default: beside it.
        kind: "svg" or "png".
    """
    head, rows = read(path)
    found = []
    with matplotlib.rc_context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot(head, rows)
            if figure is None:
                continue
            target = (folder or path.parent) / f"{path.stem}-{name}.{kind}"
            metadata = {"Date": None, "Creator": None} if kind == "svg" else None
            figure.savefig(target, metadata=metadata, dpi=150)
            pyplot.close(figure)
            found.append(target)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="plots.py", description="Draw the plots of a result file.")
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: beside the file")
    parser.add_argument("--png", action="store_true", help="PNG instead of SVG")
    options = parser.parse_args(arguments)
    for path in options.results:
        for found in draw(path, options.to, "png" if options.png else "svg"):
            print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
