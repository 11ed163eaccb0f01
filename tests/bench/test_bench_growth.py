"""Verdicts on how the cost grows, as pure functions; the ceilings of the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support_bench import TINY, module

from riformer_kernels.timing import Samples

# ----------------------------------------------------------------------------------------------------------- growth


def test_size_is_flat_in_megapixels() -> None:
    growth = module("growth")
    # 10 megapixels/s everywhere but at 1024 px.
    rates = {size: 10e6 / size**2 for size in (224, 384, 512, 768)}
    for at_1024, met in ((10.0, True), (8.6, True), (8.4, False), (11.7, True), (11.9, False)):
        found = growth.size_finding({**rates, 1024: at_1024 * 1e6 / 1024**2})
        assert found.met is met and found.limit == 0.15
    assert "megapixels/s at 224 px" in found.text and found.value == pytest.approx(1 - 10 / 11.9)


def test_batch_is_linear_with_a_fixed_part() -> None:
    growth = module("growth")
    line = {n: 2e-3 + 5e-3 * n for n in (1, 2, 4, 8, 16, 32, 64)}
    found = growth.batch_finding(line)
    assert found.met and found.value == pytest.approx(0, abs=1e-9) and found.text.startswith("2 ms and 5 ms per image")
    assert growth.batch_finding({**line, 8: 1.1 * line[8]}).met
    assert not growth.batch_finding({**line, 8: 1.3 * line[8]}).met
    assert not growth.batch_finding({n: 1e-3 * n**1.3 for n in line}).met


def test_threads_need_1_8() -> None:
    growth = module("growth")
    assert growth.threads_finding(1.8).met and not growth.threads_finding(1.79).met
    assert growth.too_few(2, 2) is None
    assert "1 core and 2 threads" in growth.too_few(1, 2) and "2 cores and 1 thread," in growth.too_few(2, 1)


def test_growth_verdict_is_withheld_when_noisy() -> None:
    growth, verdict = module("growth"), module("verdict")
    met, missed = growth.threads_finding(1.9), growth.threads_finding(1.5)
    calm, noisy = Samples((1.0, 1.01, 0.99)), Samples((1.0, 2.0, 3.0))
    assert growth.judged(met, {1: calm, 2: calm}, 0.0) == "met"
    assert growth.judged(missed, {1: calm, 2: calm}, None) == "missed"
    assert growth.judged(met, {1: calm, 2: noisy}, 0.0) == growth.judged(met, {1: calm}, 0.9) == verdict.TOO_NOISY


class FakeWorker:
    """Times that are known: 1 ms and 2 ms per image of 32 x 32 pixels, divided by the threads."""

    def __init__(self, name: str, target: str, arguments: dict, *, threads: int) -> None:
        self.facts, self.pid = {}, 0
        assert target == "peers:serve_ours" and arguments["arch"] is TINY
        self.seconds = (1e-3 + 2e-3 * arguments["batch"] * (arguments["size"] / 32) ** 2) / threads

    def sample(self, calls: int) -> float:
        return self.seconds

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def test_growth_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = module("growth")
    monkeypatch.setattr(growth, "Worker", FakeWorker)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def rows(axis: str, cores: int = 2) -> list[dict]:
        return growth.rows(axis, TINY, torch.float32, cores=cores, seconds=0.0, sizes=(32, 64, 128), batch=4, size=32)

    *points, found = rows("size")
    assert [(row["size"], row["batch"], row["threads"]) for row in points] == [(32, 4, 2), (64, 4, 2), (128, 4, 2)]
    assert points[0]["ms"] == pytest.approx(4.5) and points[0]["images_per_s"] == pytest.approx(4 / 4.5e-3)
    assert points[1]["megapixels_per_s"] == pytest.approx(4 * 64**2 / 1e6 / 16.5e-3)
    assert found["kind"] == "growth_verdict" and found["size"] is None and found["batch"] == 4
    assert found["value"] == pytest.approx(1 - (32**2 / 4.5) / (128**2 / 64.5))

    *points, found = rows("batch")
    assert [row["batch"] for row in points] == [1, 2, 4, 8, 16, 32, 64]
    assert found["text"].startswith("0.5 ms and 1 ms per image") and found["batch"] is None

    *points, found = rows("threads")
    assert [row["threads"] for row in points] == [1, 2] and found["value"] == pytest.approx(2)
    (found,) = rows("threads", cores=1)
    assert found["verdict"].startswith("withheld: 1 core") and found["value"] is None


# --------------------------------------------------------------------------------------------------------- ceilings


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The probe is not compiled yet; the place where it will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = module("peak").build
    build.cache_clear()
    yield tmp_path / "riformer_kernels"
    build.cache_clear()


def test_probe_measures_what_the_processor_has(fresh: Path) -> None:
    peak = module("peak")
    try:
        peak.build()
    except OSError as error:
        if "no C++ compiler" not in str(error):
            raise
        pytest.skip(str(error))
    rows = peak.rows(2, seconds=0.002, samples=2, passes=2)
    assert len(list(fresh.iterdir())) == 1
    assert all(row["reason"] is None and row["rounds"] == 4 and row["source"] == "probe" for row in rows)
    assert {row["operation"] for row in rows} >= {"copy"} and {row["threads"] for row in rows} == {1, 2}
    flags = module("machine").machine()["flags"]
    kinds = {(row["operation"], row["isa"]) for row in rows}
    for flag, kind in (
        ("fma", ("float32", "avx2")), ("avx512f", ("float32", "avx512")), ("avx512_bf16", ("bfloat16", "avx512_bf16")),
        ("avx512_vnni", ("int8", "avx512")), ("amx_bf16", ("bfloat16", "amx")), ("amx_int8", ("int8", "amx")),
    ):  # fmt: skip
        assert (kind in kinds) == (flag in flags), kind
    for row in rows:  # far from both ends of what processors do, so that a wrong count of operations is seen
        if row["operation"] == "copy":
            assert 0.5 < row["gbyte_per_s"] < 2000
        elif row["isa"] != "amx":
            floats = 8 if row["isa"] == "avx2" else 16
            lanes = floats * {"float32": 1, "bfloat16": 2, "int8": 4}[row["operation"]]
            assert 0.2e9 * 2 * lanes < 1e12 * row["tflop_per_s"] < 2 * 2 * 6.5e9 * 2 * lanes, row


def test_probe_that_cannot_be_built_is_a_row_with_the_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = module("peak")
    for compiler, reason in (("no-such-compiler", "no-such-compiler not found"), ("false", "false fails on peak.cpp")):
        peak.build.cache_clear()
        monkeypatch.setenv("CXX", compiler)
        (row,) = peak.rows(2)
        assert reason in row["reason"] and peak.ceiling([row], "float32", "avx2", 2) is None
        assert peak.bandwidth([row], 2) is None


def test_ceiling_is_the_best_of_what_may_be_used() -> None:
    peak = module("peak")
    rates = {
        ("float32", "avx2"): 1.0,
        ("float32", "avx512"): 2.0,
        ("bfloat16", "avx512_bf16"): 4.0,
        ("bfloat16", "amx"): 30.0,
    }
    rows = [
        {"source": "probe", "operation": operation, "isa": isa, "threads": 2, "tflop_per_s": rate}
        for (operation, isa), rate in rates.items()
    ]
    rows += [{**rows[0], "threads": 1, "tflop_per_s": 0.5}, {**rows[0], "source": "torch.matmul", "tflop_per_s": 99.0}]
    for dtype, isa, expected in (
        ("bfloat16", "amx", 30e12), ("bfloat16", "avx512_bf16", 4e12),
        ("bfloat16", "avx512", 2e12), ("bfloat16", "avx2", 1e12),  # computed in float32
        ("float32", "amx", 2e12), ("float16", "avx512", 2e12), ("float32", "scalar", None), ("float32", None, None),
    ):  # fmt: skip
        assert peak.ceiling(rows, dtype, isa, 2) == expected, (dtype, isa)
