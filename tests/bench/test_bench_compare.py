"""The comparison as a whole: workers, rows, result files, tables and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from support_bench import TINY, module

MODEL_KEYS = {
    "kind", "arch", "size", "batch", "dtype", "device", "isa", "threads", "peer", "form", "detail", "reason",
    "rounds", "ms", "images_per_s", "images_per_s_p20", "images_per_s_p80", "ratio", "ratio_p20", "ratio_p80",
    "verdict", "spread", "error_max", "error_rms", "error_ratio_rms", "error_passed", "extra_memory_bytes",
    "memory_ratio", "memory_method", "memory_reason", "gflop_per_s", "ceiling_share", "elsewhere",
}  # fmt: skip


def test_compare_writes_valid_lines_and_plots(
    native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare, measure, op_cases, peak = map(module, ("compare", "measure", "op_cases", "peak"))
    monkeypatch.setattr(measure, "CEILING_SIDE", 64)
    monkeypatch.setattr(op_cases, "SHAPES", {"embed": ((3, 224),), "norm": ((512, 7),)})
    rows = peak.rows
    monkeypatch.setattr(peak, "rows", lambda threads, passes: rows(threads, seconds=0.001, samples=1, passes=1))
    # A worker finds this in front of OpenVINO, should that be installed.
    (tmp_path / "openvino.py").write_text("raise ModuleNotFoundError('No module', name='openvino')")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "results" / "tiny.jsonl"
    arguments = ["--quick", "--arch", json.dumps(TINY), "--size", "64", "--batch", "2", "--dtype", "float32"]
    arguments += ["--rows", "ceilings", "model", "ops", "--peers", "eager_channels_last", "openvino_latency"]
    assert compare.main([*arguments, "--seconds", "0.1", "--threads", "2", "--no-memory", "--out", str(out)]) == 0
    assert torch.get_num_threads() == 1, "thread settings are as they were"

    head, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert head["kind"] == "header" and head["schema"] == 2 and head["torch_threads"] == 2
    assert head["settings"]["quick"] is True and head["settings"]["rows"] == ["ceilings", "model", "ops"]
    ceilings = [row for row in rows if row["kind"] == "ceiling"]
    assert [row["kind"] for row in rows[len(ceilings) :]] == 3 * ["model"] + 6 * ["op"]
    assert ceilings[-1]["tflop_per_s"] > 0 and "not a hardware peak" in ceilings[-1]["note"]

    models = {row["peer"]: row for row in rows if row["kind"] == "model"}
    assert list(models) == ["ours", "eager_channels_last", "openvino_latency"]
    assert all(set(row) >= MODEL_KEYS for row in models.values())
    missing = models["openvino_latency"]
    assert "openvino is not installed (pip install" in missing["reason"] and missing["ms"] is None
    row = models["eager_channels_last"]
    assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] and row["verdict"] and row["isa_limit"] is None
    assert row["images_per_s_p20"] <= row["images_per_s"] <= row["images_per_s_p80"]
    assert row["extra_memory_bytes"] is None
    assert models["ours"]["ratio"] is None and models["ours"]["error_passed"] is True
    assert models["ours"]["error_ratio_rms"] > 0
    if ceilings[0]["reason"] is None and head["isa"] != "scalar":
        assert models["ours"]["ceiling_share"] > 0
    ops = [row for row in rows if row["kind"] == "op"]
    assert [row["peer"] for row in ops] == 2 * ["ours", "eager", "eager_channels_last"]
    assert ops[0]["stage"] == "stem" and ops[0]["flop"] == 2 * 2 * 56**2 * 64 * 3 * 49 and ops[0]["times"] == 1
    assert ops[0]["bytes"] == 4 * (2 * 3 * 224**2 + 2 * 64 * 56**2 + 64 * (3 * 49 + 1))
    assert ops[3]["shape"] == [2, 512, 7, 7] and ops[3]["gbyte_per_s"] > 0 and ops[3]["stage"] is None

    printed = capsys.readouterr()
    assert "openvino_latency: ImportError: openvino is not installed" in printed.out
    assert "the best peer on the unchanged model" in printed.out and f"{len(rows) + 1} rows in" in printed.out
    assert "[  0%]" in printed.err and "building eager_channels_last" in printed.err
    drawn = {path.name for path in out.parent.iterdir()} - {out.name}
    if "matplotlib is not installed" in printed.out:
        assert drawn == {"tiny-summary.svg"}
    else:
        assert drawn == {"tiny-summary.svg", "tiny-throughput.svg", "tiny-roofline.svg"}
        assert all(name in printed.out for name in drawn)


class FakeWorker:
    """A peer's worker without a process: computes the model, takes a known time, and dies where it is told to."""

    dies_when_built: tuple[str, ...] = ()
    dies_in_round: Mapping[str, int] = MappingProxyType({})

    def __init__(self, name: str, target: str, arguments: dict, **options: object) -> None:
        worker, subject, peers = map(module, ("worker", "subject", "peers"))
        self.name, self.pid, self.closed, self.calls = name, 0, False, 0
        self.facts = {"detail": "fake", "batches": 1}
        self.error = worker.WorkerError(name, f"{name} is gone")
        if name in self.dies_when_built:
            raise self.error
        folder = Path(arguments["folder"])
        found = subject.Subject.load(folder / peers.SUBJECT)
        inputs = torch.load(folder / peers.INPUTS, weights_only=True)
        with torch.inference_mode():
            torch.save(peers.outputs(found.model, inputs), folder / f"{name}.pt")

    def sample(self, calls: int) -> float:
        self.calls += 1
        if self.calls > self.dies_in_round.get(self.name, 10**6):
            raise self.error
        return {"ours": 0.5, "eager": 1.0}.get(self.name, 2.0)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def fake_model(monkeypatch: pytest.MonkeyPatch, **fate: object) -> dict[str, dict]:
    measure = module("measure")
    monkeypatch.setattr(measure, "Worker", type("Doomed", (FakeWorker,), fate))
    needs = {"ours": 10, "eager": 40}
    monkeypatch.setattr(
        measure, "peak_memory",
        lambda target, arguments, batch, threads: measure.Memory(needs.get(arguments["name"]), "VmHWM", None),
    )  # fmt: skip
    names = ("ours", "eager", "eager_channels_last", "eager_linear")
    limit = fate.get("limit")
    names = (*names, "onnxruntime") if limit else names
    rows = measure.model(TINY, 32, 1, torch.float32, seconds=0.0, names=names, memory=limit is None, limit=limit)
    return {row["peer"]: row for row in rows}


def test_peer_that_dies_has_a_reason_and_the_rest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fate = {"dies_when_built": ("eager_linear",), "dies_in_round": {"eager_channels_last": 3}}
    rows = fake_model(monkeypatch, **fate)
    assert rows["eager"]["ratio"] == 2.0 and rows["eager"]["reason"] is None
    assert rows["eager"]["memory_ratio"] == 0.25 and rows["ours"]["extra_memory_bytes"] == 10
    assert rows["eager_channels_last"]["memory_ratio"] is rows["eager_linear"]["extra_memory_bytes"] is None
    for name in ("eager_linear", "eager_channels_last"):
        assert rows[name]["reason"] == f"{name} is gone" and rows[name]["ms"] is None and rows[name]["ratio"] is None


def test_ours_that_dies_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for fate in ({"dies_when_built": ("ours",)}, {"dies_in_round": {"ours": 2}}):
        with pytest.raises(module("worker").WorkerError, match="ours is gone"):
            fake_model(monkeypatch, **fate)


def test_peer_that_cannot_be_limited_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, isa = module("measure"), module("isa")
    status = {"supported": ["avx512", "avx2"], "error": None, "chosen": "avx512"}
    monkeypatch.setattr(isa.cpu, "isa_status", lambda: status)
    rows = fake_model(monkeypatch, limit="avx2")
    assert rows["onnxruntime"]["reason"].startswith("cannot be limited to avx2: it has no switch")
    assert {row["isa_limit"] for row in rows.values()} == {"avx2"} and rows["eager"]["isa"] == "avx2"
    assert measure.best_peer(list(rows.values()), "unchanged")["peer"] == "eager"


# ----------------------------------------------------------------------------------------------- result file, tables


def result_rows() -> list[dict]:
    """Rows with what tables and plots read: two peers and one that failed, two stages, ceilings, growth."""
    common = {
        "arch": "s12",
        "size": 224,
        "dtype": "bfloat16",
        "batch": 16,
        "isa_limit": None,
        "threads": 2,
        "kind": "model",
    }
    nothing = dict.fromkeys(MODEL_KEYS)
    rate = {"images_per_s": 200.0, "images_per_s_p20": 190.0, "images_per_s_p80": 210.0, "spread": 0.1, "ms": 80.0}
    slow = {"images_per_s": 50.0, "images_per_s_p20": 30.0, "images_per_s_p80": 60.0, "spread": 0.6, "ms": 320.0}
    judged = {"ratio": 4.0, "ratio_p20": 3.0, "ratio_p80": 7.0, "verdict": "too noisy to judge"}
    models = [
        {**nothing, **common, "peer": "ours", "form": "unchanged", **rate},
        {**nothing, **common, "peer": "eager_linear", "form": "rewritten", **slow, **judged},
        {**nothing, **common, "peer": "onnxruntime", "form": "unchanged", "reason": "no bfloat16"},
    ]
    op = {"kind": "op", "peer": "ours", "batch": 16, "dtype": "bfloat16", "threads": 2}
    ops = [
        {
            **op,
            "op": "block",
            "shape": [16, 64, 56, 56],
            "stage": "stage 1",
            "flop_per_byte": 250.0,
            "gflop_per_s": 400.0,
        },
        {**op, "op": "head", "shape": [16, 512, 7, 7], "stage": "head", "flop_per_byte": 16.0, "gflop_per_s": 30.0},
        {**op, "op": "norm", "shape": [16, 64, 56, 56], "stage": None, "flop_per_byte": 0.0, "gflop_per_s": None},
    ]
    probe = {"kind": "ceiling", "source": "probe", "threads": 2, "reason": None}
    ceilings = [
        {**probe, "operation": "bfloat16", "isa": "avx512", "tflop_per_s": 1.0},
        {**probe, "operation": "copy", "isa": None, "gbyte_per_s": 25.0},
    ]
    growth = {"kind": "growth_verdict", "axis": "threads", "arch": "s12", "dtype": "bfloat16", "size": 224, "batch": 16}
    return [*ceilings, *models, {**growth, "threads": None, "text": "1.90x", "verdict": "met"}, *ops]


HEAD = {
    "kind": "header", "cpu": "A Processor", "cores": 2, "torch_threads": 2, "isa": "avx512", "torch": "2.13.0+cpu",
    "commit": None, "dirty": None, "date": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


def test_report_says_everything_that_is_not_a_number() -> None:
    tables = module("tables")
    text = tables.report([HEAD, *[row for row in result_rows() if row["kind"] != "op"]])
    for expected in (
        "bfloat16, 2 threads: 1.000 TFLOP/s by avx512",
        "copy, 2 threads: 25.0 GB/s",
        "onnxruntime: no bfloat16",
        "4.00x the best peer on the model rewritten by hand, eager_linear (too noisy to judge)",
        "growth over threads, s12 bfloat16, size 224, batch 16: met: 1.90x",
    ):
        assert expected in text
    missing = {"kind": "ceiling", "reason": "no C++ compiler", "operation": None, "threads": 2}
    assert "ceilings: no C++ compiler" in tables.report([HEAD, missing])


def test_lines_turn_what_json_lacks_into_null() -> None:
    journal = module("journal")
    assert json.loads(journal.line({"a": math.inf, "b": math.nan, "c": 1.5})) == {"a": None, "b": None, "c": 1.5}


def test_compare_rejects_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (["--batch", "0"], ["--dtype", "int8"], ["--threads", "-1"], ["--rows", "all"], ["--isa", "sse"]):
        with pytest.raises(SystemExit):
            module("compare").main(bad)
        assert bad[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ plots


def test_throughput_bars_are_the_rates() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the peers extra)")
    figure = module("plots").throughput(HEAD, result_rows())
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [200.0, 50.0]
    assert [list(line.get_xdata()) for line in axis.lines] == [[190.0, 210.0], [30.0, 60.0]]
    assert [text.get_text() for text in axis.texts] == ["200", "50 (noisy)", "no bfloat16"]
    assert axis.get_title(loc="left") == "bfloat16, batch 16" and "images/s" in axis.get_xlabel()


def test_roofline_has_every_stage_under_the_measured_roofs() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the peers extra)")
    figure = module("plots").roofline(HEAD, result_rows())
    (axis,) = figure.axes
    roofs, points = axis.lines[:2], axis.lines[2:]
    assert roofs[0].get_xdata()[0] == pytest.approx(40) and list(roofs[0].get_ydata()) == [1000.0, 1000.0]
    assert roofs[1].get_ydata()[-1] == pytest.approx(1000)  # they meet
    assert sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in points) == [(16.0, 30.0), (250.0, 400.0)]


def test_plots_are_the_same_bytes_for_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the peers extra)")
    plots = module("plots")
    path = tmp_path / "it.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (HEAD, *result_rows())))
    drawn = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert plots.main([str(path), "--to", str(tmp_path / name)]) == 0
        drawn.append({found.name: found.read_bytes() for found in (tmp_path / name).iterdir()})
    assert drawn[0] == drawn[1] and list(map(len, drawn)) == [2, 2]
    assert all(len(data) < 120_000 and b"dc:date" not in data for data in drawn[0].values())
    path.write_text(json.dumps(HEAD) + "\n")
    assert plots.draw(path) == []
