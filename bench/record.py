#!/usr/bin/env python3
"""The comparison of the patched model with its peers, as a table and as JSON lines.

    python bench/record.py                     # about an hour on 2 cores, most of it torch.compile
    python bench/record.py --quick --no-compile

Writes one JSON object per line: first the machine ("kind": "header"), then "ceiling", "model" and "op" rows.
Read it with ``pandas.read_json(path, lines=True)`` or line by line.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import machine
import measure
import op_cases
import peers
import torch
from peers import OURS

SCHEMA = 1
RESULTS = harness.HERE / "results"
FULL_SECONDS, QUICK_SECONDS = 6.0, 0.4
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="record.py", description="Compare the patched model with its peers; write the rows as JSON lines."
    )
    found.add_argument("--quick", action="store_true", help="little measuring: a look, not a result")
    found.add_argument(
        "--out", type=Path, metavar="FILE", help="default: bench/results/<processor>-<instruction set>.jsonl"
    )
    found.add_argument("--threads", type=_positive, metavar="N", help="PyTorch's threads (default: its own choice)")
    found.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes per row")
    found.add_argument("--no-ops", action="store_true", help="the model alone")
    found.add_argument("--no-memory", action="store_true", help="no memory measurements")
    found.add_argument("--arch", type=_arch, default="s12", help="a name, or a dict as JSON (default: s12)")
    found.add_argument("--size", type=_positive, default=224, metavar="N", help="side of the images (default: 224)")
    found.add_argument("--batch", type=_positive, nargs="+", default=[1, 16], metavar="N", help="default: 1 16")
    found.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="default: float32 bfloat16"
    )
    found.add_argument(
        "--seconds", type=float, metavar="S", help=f"measured per peer and row (default: {FULL_SECONDS:g})"
    )
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _arch(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("{") else text


# ---------------------------------------------------------------------------------------------------------- running


class Progress:
    """A line on standard error: overwritten on a terminal, one per step elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.what = ""

    def step(self, what: str) -> None:
        self.done += 1
        self.what = what
        self.say("")

    def say(self, detail: str) -> None:
        passed = time.monotonic() - self.start
        text = f"[{self.done}/{self.total}] {passed:5.0f} s  {self.what}{': ' if detail else ''}{detail}"
        end, start = ("", "\r\x1b[K") if sys.stderr.isatty() else ("\n", "")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Header, ceilings, models, ops: each row as soon as it is measured."""
    seconds = options.seconds or (QUICK_SECONDS if options.quick else FULL_SECONDS)
    dtypes = tuple(getattr(torch, name) for name in options.dtype)
    # One batch size of the ops in a quick run, and less time than for the model: there are many of them.
    batches = (1,) if options.quick else op_cases.BATCHES
    cases = [] if options.no_ops else [case for op in op_cases.SHAPES for case in op_cases.cases(op, dtypes, batches)]
    progress = Progress(1 + len(dtypes) * len(options.batch) + len(cases))
    settings = {
        "quick": options.quick, "seconds_per_peer": seconds, "threads_asked_for": options.threads,
        "compile": not options.no_compile,
    }  # fmt: skip
    try:
        yield {"kind": "header", "schema": SCHEMA, **machine.machine(), "settings": settings}
        progress.step("matrix product")
        ceilings = measure.ceilings(dtypes, seconds=min(seconds, 2.0), side=measure.CEILING_SIDE)
        yield from ceilings
        flop = {row["dtype"]: 1e12 * row["tflop_per_s"] for row in ceilings}
        for dtype in dtypes:
            name = measure.dtype_name(dtype)
            for batch in options.batch:
                progress.step(f"{name}, batch {batch}")
                yield from measure.model(
                    options.arch, options.size, batch, dtype, seconds=seconds, compiled=not options.no_compile,
                    memory=not options.no_memory, ceiling=flop[name], progress=progress.say,
                )  # fmt: skip
        for case in cases:
            progress.step(str(case))
            yield from measure.op(case, seconds=seconds / 12, ceiling=flop[measure.dtype_name(case.dtype)])
    finally:
        progress.close()


# ---------------------------------------------------------------------------------------------------------- printing


def table(header: Sequence[str], cells: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned plain text; the first ``left`` columns to the left."""
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        parts = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        return "  ".join(parts).rstrip()

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
        f"{head['cpu']}, {head['cores']} cores, {head['torch_threads']} threads, ISA {head['isa']}; torch {head['torch']}, "
        f"commit {(head['commit'] or 'unknown')[:12]}{' with changes' if head['dirty'] else ''}"
    )
    for row in (row for row in rest if row["kind"] == "ceiling"):
        parts.append(
            f"{row['dtype']}: {row['tflop_per_s']:.3f} TFLOP/s in a {row['side']}^3 torch.matmul (not a hardware peak)"
        )
    models = [row for row in rest if row["kind"] == "model"]
    for key in dict.fromkeys((row["dtype"], row["batch"]) for row in models):
        parts += ["", *_model_report([row for row in models if (row["dtype"], row["batch"]) == key])]
    ops = [row for row in rest if row["kind"] == "op"]
    if ops:
        parts += ["", _op_report(ops)]
    return "\n".join(parts)


def _model_report(group: list[dict[str, Any]]) -> list[str]:
    first = group[0]
    lines = [
        f"{first['arch']} at {first['size']} px, {first['dtype']}, batch {first['batch']} (ratio: ours over the peer)"
    ]
    cells = []
    for row in group:
        memory = _number(row["extra_memory_bytes"], "{:.0f}") if row["extra_memory_bytes"] is None else (
            f"{row['extra_memory_bytes'] / 1e6:.1f}" + _number(row["memory_ratio"], " ({:.2f}x)") * (row["peer"] != OURS)
        )  # fmt: skip
        cells.append([
            row["peer"], _number(row["images_per_s"], "{:.1f}"), _number(row["spread"], "{:.0%}"), *_rate(row),
            _number(row["error_rms"], "{:.1e}"), _number(row["error_ratio_rms"], "{:.2f}x"),
            _number(row["ceiling_share"], "{:.0%}"), memory,
        ])  # fmt: skip
    header = (
        "peer",
        "images/s",
        "spread",
        "ratio",
        "p20..p80",
        "verdict",
        "rms error",
        "vs eager",
        "of matmul",
        "extra MB",
    )
    lines.append(table(header, cells))
    lines += [f"{row['peer']}: {row['reason']}" for row in group if row["reason"]]
    lines += [f"memory of {row['peer']}: {row['memory_reason']}" for row in group if row["memory_reason"]]
    if (first["elsewhere"] or 0.0) > 0.05:
        lines.append(f"{first['elsewhere']:.0%} of the processors' time went to other processes meanwhile")
    for form, what in ((peers.UNCHANGED, "the unchanged model"), (peers.REWRITTEN, "the model rewritten by hand")):
        best = measure.best_peer(group, form)
        if best is not None:
            judged = f" ({best['verdict']})" if best["verdict"] == harness.TOO_NOISY else ""
            lines.append(f"{best['ratio']:.2f}x the best peer on {what}, {best['peer']}{judged}")
    return lines


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
            row["op"], shape, row["dtype"], row["peer"], f"{1e3 * mine['ms']:.1f}", f"{1e3 * row['ms']:.1f}", *_rate(row),
            _number(mine["gflop_per_s"], "{:.0f}"), _number(mine["gbyte_per_s"], "{:.1f}"),
            _number(mine["error_ratio_rms"], "{:.2f}x"),
        ])  # fmt: skip
    header = (
        "op", "shape", "dtype", "peer", "ours us", "peer us", "ratio", "p20..p80", "verdict", "GFLOP/s", "GB/s", "rms vs eager"
    )  # fmt: skip
    return table(header, cells, left=4)


# ------------------------------------------------------------------------------------------------------------- main


def default_path(head: dict[str, Any]) -> Path:
    name = f"{head['cpu']} {head['isa']}".lower()
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.jsonl"


def _line(row: dict[str, Any]) -> str:
    """JSON; what is not finite (a peer without any error to compare with, a peer that returns NaN) becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """0; errors of ours (numbers that are off) are raised, those of peers become rows."""
    options = parser().parse_args(arguments)
    found = []
    with _threads(options.threads):
        measured = rows(options)
        found.append(next(measured))
        path = options.out or default_path(found[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the old result until this one is complete.
        partial = path.with_name(path.name + ".partial")
        with partial.open("w") as file:
            file.write(_line(found[0]))
            for row in measured:
                found.append(row)
                file.write(_line(row))
                file.flush()
        partial.replace(path)
    print(report(found))
    print(f"\n{len(found)} rows in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
