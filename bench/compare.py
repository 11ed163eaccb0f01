#!/usr/bin/env python3
"""The comparison of the patched model with its peers: tables, JSON lines and plots.

    python bench/compare.py                                # an hour and a half on 2 cores, mostly torch.compile
    python bench/compare.py --quick                        # five minutes, without torch.compile: a look, not a result
    python bench/compare.py --resume                       # goes on where the last run was interrupted
    python bench/compare.py --rows model --batch 16 --dtype bfloat16
    python bench/compare.py --rows int8                    # the peers that compute in int8, and how accurate they are
    python bench/plots.py bench/results/FILE.jsonl         # the plots again; summary.py for the small picture

Writes one JSON object per line: first the machine ("kind": "header"), then "ceiling", "model" (those in int8 as well),
"int8_accuracy", "growth", "growth_verdict" and "op" rows, and a "left_out" row for each step that there was no time
for. Until it is complete, the rows are in FILE.partial (`journal.py`). Read it with
``pandas.read_json(path, lines=True)`` or line by line.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digit_images
import growth
import int8_accuracy
import isa
import machine
import measure
import op_cases
import peak
import peers
import summary
import tables
import torch
from budget import Budget, OutOfTimeError
from child import HERE
from journal import Journal, JournalError
from progress import Progress
from result_file import forced_set, machine_set

from riformer_kernels.dtypes import NAMES
from riformer_kernels.errors import BackendError
from riformer_kernels.machine import threads, usable_cpus

SCHEMA = 2
RESULTS = HERE / "results"
FULL_SECONDS, QUICK_SECONDS = 6.0, 0.4
QUICK_LIMIT = 300.0
"""Seconds for the whole of ``--quick``."""
ROWS = ("ceilings", "model", "int8", "larger", "isa", "growth", "ops")
QUICK_ROWS = ("ceilings", "model", "ops", "growth", "isa")
"""Those of ``--quick``, the most important first: what there is no time for is left out."""
QUANTISING = 30
"""About the seconds that a peer in int8 needs before it can be timed."""
LARGER = (("s12", 384, 16, torch.bfloat16), ("m48", 224, 16, torch.bfloat16))
"""Beside the chosen model: more pixels, and the largest model. On these, peers on the unchanged model only."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="compare.py",
        description="Compare the patched model with its peers; write the rows as JSON lines, and plots.",
    )
    add = found.add_argument
    add("--quick", action="store_true", help="five minutes at most, no torch.compile: a look, not a result")
    add("--resume", action="store_true", help="go on with the comparison that was interrupted; same options")
    add(
        "--rows",
        nargs="+",
        choices=ROWS,
        metavar="KIND",
        help=f"of {', '.join(ROWS)} (default: all; --quick: no int8 and no larger)",
    )
    add("--out", type=Path, metavar="FILE", help="default: bench/results/<processor>-<instruction set>.jsonl")
    add("--threads", type=_positive, metavar="N", help="of every peer (default: PyTorch's own choice)")
    known = list(dict.fromkeys([*peers.factories(int8=False), *peers.factories(int8=True)]))
    add("--peers", nargs="+", choices=known, metavar="PEER", help=f"of {', '.join(known)}")
    add("--no-compile", action="store_true", help="without torch.compile, which takes minutes per row")
    add("--no-memory", action="store_true", help="no memory measurements")
    add("--no-plots", action="store_true", help="the result file alone")
    add("--arch", type=_arch, default="s12", help="a name, or a dict as JSON (default: s12)")
    add("--size", type=_positive, default=224, metavar="N", help="side of the images (default: 224)")
    add("--batch", type=_positive, nargs="+", metavar="N", help="default: 1 16; --quick: 16")
    add("--dtype", nargs="+", choices=NAMES, default=["float32", "bfloat16"], help="default: float32 bfloat16")
    add("--isa", nargs="+", choices=isa.LIMITS, help="instruction sets that nobody may exceed, for the isa rows "
        "(default: those below this machine's best)")  # fmt: skip
    add("--seconds", type=float, metavar="S", help=f"measured per peer and row (default: {FULL_SECONDS:g})")
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _arch(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("{") else text


# ---------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Step:
    """A part of the comparison: what it is, about how many seconds it takes, and what makes its rows."""

    what: str
    weight: float
    rows: Callable[[Callable[[str], None]], list[dict[str, Any]]]


class Plan:
    """The steps that the options ask for; ``ceilings`` are the rows of the ceilings once their steps are finished."""

    def __init__(self, options: argparse.Namespace, cores: int) -> None:
        self.quick = options.quick
        self.seconds = options.seconds or (QUICK_SECONDS if options.quick else FULL_SECONDS)
        order = (*QUICK_ROWS, "int8", "larger") if options.quick else ROWS
        self.kinds = [kind for kind in order if kind in (options.rows or (QUICK_ROWS if options.quick else ROWS))]
        self.batches = options.batch or ([16] if options.quick else [1, 16])
        self.dtypes = tuple(getattr(torch, name) for name in options.dtype)
        self.compiled = not (options.no_compile or options.quick)
        self.limits = isa.below() if options.isa is None else options.isa
        self.options, self.cores = options, cores
        self.ceilings: list[dict[str, Any]] = []

    def settings(self) -> dict[str, Any]:
        """For the header."""
        return {
            "quick": self.quick, "seconds_per_peer": self.seconds, "threads_asked_for": self.options.threads,
            "compile": self.compiled, "rows": list(self.kinds), "arch": self.options.arch, "size": self.options.size,
            "batches": list(self.batches), "dtypes": list(self.options.dtype), "limits": list(self.limits),
            "peers": self.options.peers, "memory": not self.options.no_memory,
        }  # fmt: skip

    def steps(self) -> list[Step]:
        made = {
            "ceilings": self._ceilings, "model": self._model, "int8": self._int8, "larger": self._larger,
            "isa": self._isa, "growth": self._growth, "ops": self._ops,
        }  # fmt: skip
        return [step for kind in self.kinds for step in made[kind]()]

    def _ceilings(self) -> Iterator[Step]:
        def probe(say: Callable[[str], None]) -> list[dict[str, Any]]:
            return peak.rows(torch.get_num_threads(), passes=1 if self.quick else peak.PASSES)

        yield Step("ceilings of the processor", 5 if self.quick else 20, probe)
        seconds = min(self.seconds, 2.0)
        yield Step(
            "matrix product of the library", 5, lambda say: measure.matmul_ceilings(self.dtypes, seconds=seconds)
        )

    def _ceiling(self, dtype: torch.dtype, limit: str | None = None) -> float | None:
        name = measure.dtype_name(dtype)
        return peak.ceiling(self.ceilings, name, limit or isa.best(), torch.get_num_threads())

    def _names(self, rewritten: bool = True, *, int8: bool = False) -> list[str]:
        """Of the peers that the options ask for; ours always."""
        found = peers.names(self.compiled, rewritten, int8)
        wanted = self.options.peers
        return [name for name in found if not wanted or name == peers.OURS or name in wanted]

    def _cell(
        self, arch: Any, size: int, batch: int, dtype: torch.dtype, *, rewritten: bool = True, memory: bool = False,
        limit: str | None = None,
    ) -> Step:  # fmt: skip
        names = self._names(rewritten, int8=dtype == torch.int8)

        def rows(say: Callable[[str], None]) -> list[dict[str, Any]]:
            return measure.model(
                arch, size, batch, dtype, seconds=self.seconds, names=names, memory=memory, limit=limit,
                ceiling=self._ceiling(dtype, limit), progress=say,
            )  # fmt: skip

        name = f"{arch if isinstance(arch, str) else 'custom'} at {size} px, {measure.dtype_name(dtype)}, batch {batch}"
        build = QUANTISING if dtype == torch.int8 else 10
        weight = sum(build + self.seconds + 100 * (peer in peers.COMPILED) for peer in names)
        name += f", at most {limit}" if limit else "" if rewritten else ", unchanged peers"
        return Step(name, weight, rows)

    def _model(self) -> Iterator[Step]:
        options = self.options
        for dtype in self.dtypes:
            for batch in self.batches:
                yield self._cell(options.arch, options.size, batch, dtype, memory=not options.no_memory)

    def _int8(self) -> Iterator[Step]:
        arch, size = self.options.arch, self.options.size
        missing = digit_images.available()
        if missing:
            name = arch if isinstance(arch, str) else "custom"
            row = {"kind": "int8_accuracy", "arch": name, "size": size, "peer": None, "reason": missing}
            yield Step("int8", 1, lambda say: [row])
            return
        for batch in self.batches:
            yield self._cell(arch, size, batch, torch.int8)
        names = self._names(int8=True)
        weight = sum(QUANTISING + 100 * (peer in peers.COMPILED) for peer in names)
        yield Step("accuracy of int8", weight, lambda say: int8_accuracy.rows(arch, size, names, say))

    def _larger(self) -> Iterator[Step]:
        for cell in LARGER:
            yield self._cell(*cell, rewritten=False)

    def _isa(self) -> Iterator[Step]:
        for limit in self.limits:
            for dtype in (dtype for dtype in self.dtypes if measure.dtype_name(dtype) in isa.TABLE[limit].dtypes):
                for batch in self.batches:
                    yield self._cell(self.options.arch, self.options.size, batch, dtype, rewritten=False, limit=limit)

    def _growth(self) -> Iterator[Step]:
        shapes: dict[str, Any] = {"sizes": growth.SIZES[:3], "batches": (1, 4, 16)} if self.quick else {}
        for dtype in self.dtypes:
            for axis, batches in (("size", self.batches), ("batch", self.batches[:1]), ("threads", self.batches)):
                for batch in batches:
                    at = "" if axis == "batch" else f", batch {batch}"
                    yield Step(
                        f"growth over {axis}, {measure.dtype_name(dtype)}{at}",
                        35 + 7 * self.seconds,
                        lambda say, dtype=dtype, axis=axis, batch=batch: growth.rows(
                            axis, self.options.arch, dtype, cores=self.cores, seconds=self.seconds,
                            size=self.options.size, batch=batch, progress=say, **shapes,
                        ),
                    )  # fmt: skip

    def _ops(self) -> Iterator[Step]:
        # Less time than for the model: there are many of them.
        seconds = self.seconds / 12
        for op in op_cases.SHAPES:
            for case in op_cases.cases(op, self.dtypes, self.batches):
                yield Step(
                    str(case),
                    2 + 3 * seconds,
                    lambda say, case=case: measure.op(case, seconds=seconds, ceiling=self._ceiling(case.dtype)),
                )


def header(plan: Plan) -> dict[str, Any]:
    return {"kind": "header", "schema": SCHEMA, **machine.machine(), "settings": plan.settings()}


def run_steps(plan: Plan, journal: Journal, budget: Budget) -> list[dict[str, Any]]:
    """Make every step that the journal lacks and the budget has time for; returns a row for each that was left out."""
    steps = plan.steps()
    progress = Progress(sum(step.weight for step in steps))
    left_out = []
    finished = False
    try:
        for step in steps:
            progress.step(step.what, step.weight)
            if step.what not in journal.finished:
                try:
                    found = budget.run(step.weight, functools.partial(step.rows, progress.say))
                except OutOfTimeError as error:
                    left_out.append({"kind": "left_out", "step": step.what, "reason": str(error)})
                    continue
                journal.add(step.what, found)
            plan.ceilings += [row for row in journal.finished[step.what] if row["kind"] == "ceiling"]
        finished = True
    finally:
        progress.close(finished)
    return left_out


# ------------------------------------------------------------------------------------------------------------- main


def default_path(head: dict[str, Any], quick: bool, limits: Sequence[str] = ()) -> Path:
    """Where a result goes. A quick one has a file of its own, as the README is made from the full one.

    Args:
        head: the header.
        limits: where nothing but limited rows is measured, what they are limited to: that is no result of a machine
            that has nothing better, and its file must not look like one.
    """
    name = f"{head['cpu']} {machine_set(head)}"
    if limits:
        name += f" limited to {' '.join(limits)}"
    elif forced_set(head):
        name += f" ours limited to {forced_set(head)}"
    name = f"{name}{' quick' if quick else ''}".lower()
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.jsonl"


def _plots(path: Path) -> str:
    """Draw the summary and the plots; what was drawn, as text."""
    drawn = [found.name for found in (summary.draw(path),) if found is not None]
    try:
        import plots
    except ImportError as error:
        missing = f"{error.name} is not installed (pip install 'riformer-kernels[peers]')"
        return f"drawn: {', '.join(drawn) or 'nothing'}; no plots: {missing}"
    drawn += [found.name for found in plots.draw(path)]
    return f"drawn: {', '.join(drawn) or 'nothing, no rows for a plot'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 for an instruction set that is not there and for an unfinished comparison that is in the way.

    Raises:
        AssertionError: our numbers are off. What goes wrong with a peer is the reason in its row.
    """
    options = parser().parse_args(arguments)
    try:
        for name in (None, *(options.isa or ())):
            isa.check(name)
    except BackendError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    with threads(options.threads):
        plan = Plan(options, usable_cpus())
        head = header(plan)
        limits = plan.limits if "isa" in plan.kinds and set(plan.kinds) <= {"isa", "ceilings"} else ()
        path = options.out or default_path(head, options.quick, limits)
        try:
            # Beside the old result until this one is complete.
            journal = Journal(path.with_name(path.name + ".partial"), head, resume=options.resume)
        except JournalError as error:
            print(f"compare.py: {error}", file=sys.stderr)
            return 2
        too_few = growth.too_few(plan.cores, torch.get_num_threads())
        if too_few:
            print(f"compare.py: thread scaling {too_few}", file=sys.stderr)
        left_out = run_steps(plan, journal, Budget(QUICK_LIMIT if options.quick else None))
        found = journal.finish(path, [step.what for step in plan.steps()], left_out)
    print(tables.report(found))
    print(f"\n{len(found)} rows in {path}")
    if not options.no_plots:
        print(_plots(path))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\ncompare.py: interrupted; what is finished is kept, go on with --resume and the same options")
