"""The rows of a comparison as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import measure
import peers
from peers import OURS
from verdict import TOO_NOISY


def table(header: Sequence[str], cells: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned plain text; the first ``left`` columns to the left."""
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(line[:left], widths[:left], strict=True)]
        padded += [cell.rjust(width) for cell, width in zip(line[left:], widths[left:], strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([text(header), text(["-" * width for width in widths]), *map(text, cells)])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _rate(row: dict[str, Any]) -> list[str]:
    scatter = "-" if row["ratio"] is None else f"{row['ratio_p20']:.2f}..{row['ratio_p80']:.2f}"
    return [_number(row["ratio"], "{:.2f}x"), scatter, row["verdict"] or "-"]


def report(found: Sequence[dict[str, Any]]) -> str:
    """All tables."""
    parts = []
    head, *rest = found
    parts.append(
        f"{head['cpu']}, {head['cores']} cores, {head['torch_threads']} threads, ISA {head['isa']}; "
        f"torch {head['torch']}, commit {(head['commit'] or 'unknown')[:12]}{' with changes' if head['dirty'] else ''}"
    )
    parts += _ceiling_report([row for row in rest if row["kind"] == "ceiling"])
    models = [row for row in rest if row["kind"] == "model"]
    for key in dict.fromkeys(map(_cell, models)):
        parts += ["", *_model_report([row for row in models if _cell(row) == key])]
    accuracy = [row for row in rest if row["kind"] == "int8_accuracy"]
    if accuracy:
        parts += ["", *_accuracy_report(accuracy)]
    grown = [row for row in rest if row["kind"] in ("growth", "growth_verdict")]
    if grown:
        parts += ["", *_growth_report(grown)]
    ops = [row for row in rest if row["kind"] == "op"]
    if ops:
        parts += ["", _op_report(ops)]
    left_out = [row["step"] for row in rest if row["kind"] == "left_out"]
    if left_out:
        parts += ["", f"left out, as there was no time left: {'; '.join(left_out)}"]
    return "\n".join(parts)


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("arch", "size", "dtype", "batch", "isa_limit"))


def _ceiling_report(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in found:
        if row["reason"]:
            lines.append(f"ceilings: {row['reason']}")
        elif row["operation"] == "copy":
            lines.append(f"copy, {_threads(row)}: {row['gbyte_per_s']:.1f} GB/s read and written")
        else:
            unit = "TOP/s" if row["operation"] == "int8" else "TFLOP/s"
            by = row["isa"] or f"a {row['side']}^3 torch.matmul, which is no hardware peak"
            lines.append(f"{row['operation']}, {_threads(row)}: {row['tflop_per_s']:.3f} {unit} by {by}")
    return lines


def _threads(row: dict[str, Any]) -> str:
    return f"{row['threads']} thread{'s' * (row['threads'] != 1)}"


def _growth_report(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in (row for row in found if row["kind"] == "growth_verdict"):
        fixed = ", ".join(f"{row[key]} {key}" if key == "threads" else f"{key} {row[key]}"
                          for key in ("size", "batch", "threads") if row[key] is not None)  # fmt: skip
        text = f": {row['text']}" if row["text"] else ""
        lines.append(f"growth over {row['axis']}, {row['arch']} {row['dtype']}, {fixed}: {row['verdict']}{text}")
    points = [row for row in found if row["kind"] == "growth"]
    cells = [
        [row["dtype"], row["axis"], *(str(row[key]) for key in ("size", "batch", "threads")), f"{row['ms']:.2f}",
         f"{row['spread']:.0%}", f"{row['images_per_s']:.1f}", f"{row['megapixels_per_s']:.2f}"]
        for row in points
    ]  # fmt: skip
    header = ("dtype", "axis", "size", "batch", "threads", "ms", "spread", "images/s", "megapixels/s")
    return [*lines, *([table(header, cells, left=2)] if cells else [])]


def _model_report(group: list[dict[str, Any]]) -> list[str]:
    first = group[0]
    limit = f", nobody above {first['isa_limit']}" if first["isa_limit"] else ""
    cell = f"{first['arch']} at {first['size']} px, {first['dtype']}, batch {first['batch']}{limit}"
    lines = [f"{cell} (ratio: ours over the peer)"]
    cells = []
    for row in group:
        memory = "-" if row["extra_memory_bytes"] is None else f"{row['extra_memory_bytes'] / 1e6:.1f}"
        if memory != "-" and row["peer"] != OURS:
            memory += _number(row["memory_ratio"], " ({:.2f}x)")
        cells.append([
            row["peer"], _number(row["images_per_s"], "{:.1f}"), _number(row["spread"], "{:.0%}"), *_rate(row),
            _number(row["error_rms"], "{:.1e}"), _number(row["error_ratio_rms"], "{:.2f}x"),
            _number(row["ceiling_share"], "{:.0%}"), memory,
        ])  # fmt: skip
    header = (
        "peer", "images/s", "spread", "ratio", "p20..p80", "verdict", "rms error", "vs eager", "of ceiling", "extra MB",
    )  # fmt: skip
    lines.append(table(header, cells))
    lines += [f"{row['peer']}: {row['reason']}" for row in group if row["reason"]]
    lines += [f"memory of {row['peer']}: {row['memory_reason']}" for row in group if row["memory_reason"]]
    if (first["elsewhere"] or 0.0) > 0.05:
        lines.append(f"{first['elsewhere']:.0%} of the processors' time went to other processes meanwhile")
    for form, what in ((peers.UNCHANGED, "the unchanged model"), (peers.REWRITTEN, "the model rewritten by hand")):
        best = measure.best_peer(group, form)
        if best is not None and best["ratio"] is not None:
            judged = f" ({best['verdict']})" if best["verdict"] == TOO_NOISY else ""
            lines.append(f"{best['ratio']:.2f}x the best peer on {what}, {best['peer']}{judged}")
    return lines


def _accuracy_report(found: list[dict[str, Any]]) -> list[str]:
    cells = [
        [row["peer"], _number(row["error_rms"], "{:.1e}"), _number(row["error_ratio_rms"], "{:.2f}x"),
         _number(row["digits_agreement"], "{:.1%}"), _number(row["digits_accuracy"], "{:.1%}")]
        for row in found if row["peer"]
    ]  # fmt: skip
    header = ("peer", "rms error", "vs eager bfloat16", "digits as float64", "digits right")
    lines = ["int8: the error of the features, and the answers to the demo's digits"]
    lines += [table(header, cells)] if cells else []
    return lines + [f"{row['peer'] or 'int8'}: {row['reason']}" for row in found if row["reason"]]


def _op_report(ops: list[dict[str, Any]]) -> str:
    cells, ours = [], {}
    for row in ops:
        key = (row["op"], tuple(row["shape"]), row["dtype"])
        if row["peer"] == OURS:
            ours[key] = row
            continue
        mine = ours[key]
        shape = "x".join(map(str, row["shape"]))
        cells.append([
            row["op"], shape, row["dtype"], row["peer"], f"{1e3 * mine['ms']:.1f}", f"{1e3 * row['ms']:.1f}",
            *_rate(row), _number(mine["gflop_per_s"], "{:.0f}"), _number(mine["gbyte_per_s"], "{:.1f}"),
            _number(mine["error_ratio_rms"], "{:.2f}x"),
        ])  # fmt: skip
    header = (
        "op", "shape", "dtype", "peer", "ours us", "peer us", "ratio", "p20..p80", "verdict", "GFLOP/s", "GB/s",
        "rms vs eager",
    )  # fmt: skip
    return table(header, cells, left=4)
