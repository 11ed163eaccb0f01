"""A comparison that is interrupted goes on where it stopped; one that has little time leaves steps out and says so."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_bench import module

HEAD = {"kind": "header", "cpu": "A Processor", "commit": "abc", "settings": {"quick": True}, "date": "1", "load": 0.1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "it.jsonl.partial"


# ---------------------------------------------------------------------------------------------------------- journal


def test_journal_keeps_finished_steps(path: Path) -> None:
    journal = module("journal")
    first = journal.Journal(path, HEAD)
    first.add("b", [{"kind": "op", "ms": float("nan")}, {"kind": "op", "ms": 2.0}])
    first.add("c", [])
    with path.open("a") as file:
        file.write('{"step": "d", "rows": [{"ki')  # killed while it wrote this
    second = journal.Journal(path, {**HEAD, "date": "2", "load": 7.0}, resume=True)
    assert second.finished == {"b": [{"kind": "op", "ms": None}, {"kind": "op", "ms": 2.0}], "c": []}
    second.add("a", [{"kind": "model"}])
    target = path.with_name("it.jsonl")
    rows = second.finish(target, ["a", "b", "c", "d"], [{"kind": "left_out"}])
    assert rows == [json.loads(text) for text in target.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["header", "model", "op", "op", "left_out"]
    assert rows[0] == {**HEAD, "resumed": ["2"]}
    assert list(path.parent.iterdir()) == [target]


def test_journal_of_something_else_is_not_gone_on_with(path: Path) -> None:
    journal = module("journal")
    journal.Journal(path, HEAD).add("a", [{"kind": "op"}])
    before = path.read_text()
    with pytest.raises(journal.JournalError, match="unfinished comparison: go on with --resume, or delete it"):
        journal.Journal(path, HEAD)
    other = {**HEAD, "commit": "def", "settings": {"quick": False}}
    with pytest.raises(journal.JournalError, match="of another commit, settings"):
        journal.Journal(path, other, resume=True)
    assert path.read_text() == before
    path.write_text("")
    with pytest.raises(journal.JournalError, match="has no header"):
        journal.Journal(path, HEAD, resume=True)


def test_interrupted_comparison_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare, measure, op_cases, peak = map(module, ("compare", "measure", "op_cases", "peak"))
    monkeypatch.setattr(compare.isa, "check", lambda name: None)
    monkeypatch.setattr(compare.isa, "best", lambda: "avx2")
    monkeypatch.setattr(compare.tables, "report", lambda rows: f"{len(rows)} rows reported")
    monkeypatch.setattr(op_cases, "SHAPES", {"norm": ((64, 56), (512, 7)), "head": ((512, 7),)})
    probe = {"kind": "ceiling", "source": "probe", "operation": "float32", "isa": "avx2", "tflop_per_s": 2.0}
    monkeypatch.setattr(peak, "rows", lambda threads, passes: [{**probe, "threads": threads}])
    monkeypatch.setattr(measure, "matmul_ceilings", lambda dtypes, seconds: [])
    measured, ceilings, interruptions = [], [], iter([False, True])

    def op(case: object, *, seconds: float, ceiling: float) -> list[dict]:
        if next(interruptions, False):
            raise KeyboardInterrupt
        measured.append(str(case))
        ceilings.append(ceiling)
        return [{"kind": "op", "op": str(case)}]

    monkeypatch.setattr(measure, "op", op)
    out = tmp_path / "it.jsonl"
    out.write_text("the old result\n")
    arguments = ["--rows", "ceilings", "ops", "--dtype", "float32", "--batch", "1", "--no-plots", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        compare.main(arguments)
    assert out.read_text() == "the old result\n"
    assert compare.main(arguments) == 2 and "go on with --resume" in capsys.readouterr().err
    assert compare.main([*arguments, "--seconds", "1", "--resume"]) == 2
    assert "is of another settings" in capsys.readouterr().err
    assert compare.main([*arguments, "--resume"]) == 0
    assert measured == ["norm 1x64x56x56 float32", "norm 1x512x7x7 float32", "head 1x512x7x7 float32"]
    assert ceilings == 3 * [2e12], "the ceilings of the first part hold for the second"
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["header", "ceiling", "op", "op", "op"]
    assert [row["op"] for row in rows[2:]] == measured
    assert list(tmp_path.iterdir()) == [out]


# ----------------------------------------------------------------------------------------------------------- budget


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds: float) -> str:
        self.now += seconds
        return "done"


def test_budget_begins_what_fits_at_the_pace_of_the_steps_before() -> None:
    budget = module("budget")
    clock = Clock()
    limited = budget.Budget(100.0 + budget.CLEANING_UP, clock)
    assert limited.run(10.0, lambda: clock.step(30.0)) == "done"
    # Three seconds for each unit of weight: 70 seconds are left, room for 23 units.
    with pytest.raises(budget.OutOfTimeError, match="no time left"):
        limited.run(24.0, lambda: clock.step(1.0))
    assert limited.run(23.0, lambda: clock.step(69.0)) == "done"
    with pytest.raises(budget.OutOfTimeError, match="no time left"):
        limited.run(1.0, lambda: clock.step(1.0))
    assert budget.Budget(None, clock).run(1e9, lambda: clock.step(1e9)) == "done"


@pytest.fixture
def timer() -> Iterator[list[int]]:
    """A timer that somebody else has set, and how often it rang."""
    rang: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    before = signal.setitimer(signal.ITIMER_REAL, 30.0)
    yield rang
    signal.setitimer(signal.ITIMER_REAL, *before)
    signal.signal(signal.SIGALRM, handler)


def test_budget_stops_what_takes_too_long(timer: list[int]) -> None:
    budget = module("budget")
    limited = budget.Budget(budget.CLEANING_UP + 0.2)
    with pytest.raises(budget.OutOfTimeError, match="not finished in time"):
        limited.run(0.0, lambda: time.sleep(20.0))
    assert 20.0 < signal.getitimer(signal.ITIMER_REAL)[0] < 30.0 and timer == []


def test_left_out_steps_are_rows_and_are_reported(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    compare, journal, budget = map(module, ("compare", "journal", "budget"))

    class Plan:
        def __init__(self) -> None:
            self.ceilings: list[dict] = []

        def steps(self) -> list:
            return [compare.Step(what, weight, lambda say: [{"kind": "op"}]) for what, weight in (("a", 1), ("b", 99))]

    clock = Clock()
    kept = journal.Journal(path, HEAD)
    left_out = compare.run_steps(Plan(), kept, budget.Budget(50.0 + budget.CLEANING_UP, clock))
    assert left_out == [{"kind": "left_out", "step": "b", "reason": "no time left"}] and list(kept.finished) == ["a"]
    head = {"cores": 2, "torch_threads": 2, "isa": "avx2", "torch": "2.13", "dirty": False, **HEAD}
    assert module("tables").report([head, *left_out]).endswith("left out, as there was no time left: b")
