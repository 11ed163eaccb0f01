"""`bench/gpu.py` end to end on the stand-in for ``torch.cuda``: every row of every contender, and errors that end
nothing but themselves. What it measures there means nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support_bench import module
from support_stand_in import stand_in

import riformer_kernels
from riformer_kernels import backends

PEERS = {
    f"{form} {layout}{graph}"
    for form in ("eager", "eager F.linear") for layout in ("NCHW", "channels_last") for graph in ("", " + graph")
}  # fmt: skip


def ours(backend: str) -> set[str]:
    ends = ("", " + graph", " Engine", " Engine, images on the CPU")
    return {f"ours {backend}{end}" for end in ends}


@pytest.fixture
def gpu(bench_on_path: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark with small sizes, and the reference in place of both backends."""
    for name in ("triton", "cuda"):
        monkeypatch.setitem(backends.ALL, name, dataclasses.replace(backends.ALL["reference"], name=name))
    found, timing = module("gpu"), module("gpu_timing")
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(timing, "SIDE", 8)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(found, "CHECKED", 2)
    monkeypatch.setattr(found, "interleaved", functools.partial(timing.interleaved, rounds=2))
    monkeypatch.setattr(found, "latencies", functools.partial(timing.latencies, count=3))
    monkeypatch.setattr(found, "fused_by", lambda *_: lambda channels, positions: True)
    monkeypatch.setattr(found, "kernel_times", lambda model, x: [{"kernel": "fused_kernel", "C": 64, "us": 1.0}])
    monkeypatch.setattr(found, "profiled_times", lambda model, x: [{"kernel": "fused_sm90", "us": 1.0}])
    benchmark = torch.backends.cudnn.benchmark
    with stand_in():
        yield found
    torch.backends.cudnn.benchmark = benchmark


def run(gpu: ModuleType, path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    status = gpu.main(["--size", "32", "--dtype", "float32", "--output", str(path / "rows.jsonl"), *arguments])
    return status, [json.loads(line) for line in (path / "rows.jsonl").read_text().splitlines()]


def test_every_contender_has_a_row(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(gpu, tmp_path, "--arch", "s12", "--batch", "1", "2", "--no-compile")
    assert status == 0 and [row["kind"] for row in rows[:2]] == ["machine", "ceiling"]
    for batch in (1, 2):
        found = {row["peer"]: row for row in rows if row["kind"] == "gpu" and row["batch"] == batch}
        assert found.keys() == ours("triton") | ours("cuda") | PEERS
        assert all(row["ms"] > 0 and row["strongest"] in PEERS for row in found.values())
        assert all(("latency_ms_p99" in row) == (batch == 1) for row in found.values())
        assert all(("rms_error_over_eager" in row) == row["peer"].startswith("ours") for row in found.values())
    assert {row["kernel"] for row in rows if row["kind"] == "kernel"} == {"fused_kernel", "fused_sm90"}
    assert sum(row["kind"] == "memory" for row in rows) == 4
    assert "ours cuda Engine" in capsys.readouterr().out
    assert torch.backends.cudnn.benchmark, "the peers' convolutions are searched for"


def test_a_backend_that_is_wrong_is_not_timed(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = gpu.checked

    def wrong(model: Any, call_on: Any, *rest: Any) -> Any:
        broken = call_on.__dict__["_riformer_kernels"].backend == "cuda"
        return checked(model, (lambda x: call_on(x) + 1) if broken else call_on, *rest)

    monkeypatch.setattr(gpu, "checked", wrong)
    status, rows = run(gpu, tmp_path, "--arch", "s12", "--batch", "2", "--no-compile")
    assert status == 0
    found = {row["peer"]: row for row in rows if row["kind"] == "gpu"}
    assert found.keys() == {"ours cuda"} | ours("triton") | PEERS
    assert "the numbers are off" in found["ours cuda"]["reason"] and "ms" not in found["ours cuda"]


def test_an_error_in_one_case_is_recorded_and_the_next_is_measured(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interleaved, written = gpu.interleaved, []

    def fail_first(functions: Any) -> Any:
        written.append(len((tmp_path / "rows.jsonl").read_text().splitlines()))
        if len(written) == 1:
            raise torch.OutOfMemoryError("Tried to allocate 5 bytes")
        return interleaved(functions)

    monkeypatch.setattr(gpu, "interleaved", fail_first)
    status, rows = run(gpu, tmp_path, "--arch", "s12", "--batch", "1", "2", "--no-compile", "--backend", "triton")
    assert status == 1
    [failed] = [row for row in rows if row.get("peer") == "all"]
    assert failed["batch"] == 1 and "Tried to allocate 5 bytes" in failed["reason"]
    assert {row["batch"] for row in rows if row.get("ms")} == {2}
    assert written[0] == 2, "the rows before the error were written before it"


def test_an_engine_that_fails_is_a_row(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no engine")

    monkeypatch.setattr(riformer_kernels, "Engine", fail)
    status, rows = run(gpu, tmp_path, "--arch", "s12", "--batch", "1", "--no-compile", "--backend", "cuda")
    [row] = [row for row in rows if "Engine" in row.get("peer", "")]
    assert status == 0 and row["reason"] == "RuntimeError: no engine"


def test_compilers_are_tried_with_and_without_graphs(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def compiled(form: Any, mode: str, **options: Any) -> Any:
        modes.append((type(form).__name__, mode))
        if modes[-1] == ("RIFormer", "max-autotune"):
            raise RuntimeError("the compiler failed")
        return form

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(gpu, "cases", lambda *_: [("s12", 1, True)])
    status, rows = run(gpu, tmp_path, "--backend", "triton")
    assert status == 0
    both = ("max-autotune-no-cudagraphs", "max-autotune")
    assert modes == [(form, mode) for form in ("RIFormer", "TokenForm") for mode in both]
    found = {row["peer"]: row for row in rows if row["kind"] == "gpu" and "compile" in row["peer"]}
    assert len(found) == 6
    [failed] = [row for row in found.values() if row["reason"]]
    assert failed["peer"] == "compile channels_last, with its graphs" and "the compiler failed" in failed["reason"]


def test_without_time_nothing_is_compiled(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cases", lambda *_: [("s12", 1, True)])
    status, rows = run(gpu, tmp_path, "--backend", "triton", "--seconds", "50")
    assert status == 0
    found = [row for row in rows if row["kind"] == "gpu" and "compile" in row["peer"]]
    assert len(found) == 4 and {row["reason"] for row in found} == {"no time left to compile it"}
    status, rows = run(gpu, tmp_path, "--backend", "triton", "--seconds", "5")
    assert status == 0 and [row["reason"] for row in rows if row["kind"] == "gpu"] == ["no time left"]
