"""`bench/gpu.py` as far as it goes without a GPU: it says that there is none, and its arithmetic is right. With a
stand-in for `torch.cuda` it is tried end to end in `test_bench_gpu_run.py`."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support_bench import module


@pytest.fixture(scope="module")
def gpu(bench_on_path: None) -> ModuleType:
    return module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so_and_writes_nothing(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gpu.main(["--output", str(tmp_path / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "nothing measured: no GPU to run on (triton: " in said and "; cuda: " in said
    assert not list(tmp_path.iterdir())


def test_defaults_are_those_of_the_targets(gpu: ModuleType) -> None:
    arguments = gpu.arguments_of([])
    assert set(arguments.arch) == {"s12", "s24", "s36", "m36", "m48"} and set(arguments.batch) == {1, 64, 256, 1024}
    assert set(arguments.backend) == {"triton", "cuda"}
    assert arguments.seconds <= 480 and arguments.size == 224 and arguments.dtype == "bfloat16"


def test_moved_bytes(gpu: ModuleType) -> None:
    """Stage by stage for S12 at 224: x in and out per block.

    Where the hidden tensor is in memory, x is read once more, and four times its size is written and read.
    """
    tokens = [64 * 56**2, 128 * 28**2, 320 * 14**2, 512 * 7**2]
    embeds = 3 * 224**2 + 2 * sum(tokens) - tokens[-1]
    blocks = 2 * 2 * tokens[0] + 2 * 2 * tokens[1] + 6 * 11 * tokens[2] + 2 * 11 * tokens[3]
    narrow = gpu.fused_by("triton", 256, torch.bfloat16)
    assert narrow(128, 784) and not narrow(320, 196)
    assert gpu.moved_bytes("s12", 224, torch.bfloat16, lambda c, positions: c < 320) == 2 * (embeds + blocks)
    all_fused = embeds + 2 * (2 * tokens[0] + 2 * tokens[1] + 6 * tokens[2] + 2 * tokens[3])
    assert gpu.moved_bytes("s12", 224, torch.bfloat16, lambda c, positions: True) == 2 * all_fused


def test_the_table_shows_what_was_not_measured(gpu: ModuleType) -> None:
    row = {"arch": "s12", "batch": 1, "peer": "compile NCHW", "reason": "no time left to compile it"}
    timed = {
        "arch": "s12", "batch": 256, "peer": "ours", "ms": 3.5, "images_per_s": 73142.9, "over_strongest": 1.5,
        "of_matrix_rate": 0.34, "gbyte_per_s": 1234.0, "latency_ms_p50": 0.1234, "latency_ms_p99": 0.5,
    }  # fmt: skip
    lines = gpu.shown([timed, row])
    assert "73,143" in lines[1] and "34.0 %" in lines[1] and "0.123/0.500" in lines[1]
    assert lines[2].endswith("no time left to compile it")


def test_samples_rotate(bench_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = module("gpu_timing")
    order = []
    monkeypatch.setattr(timing, "timed", lambda call, calls: call() or 1.0)
    found = timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order[6:] == ["a", "b", "b", "a"]
    assert {name: samples.seconds for name, samples in found.items()} == {"a": (1.0, 1.0), "b": (1.0, 1.0)}


def test_cases_come_in_the_order_of_interest(gpu: ModuleType) -> None:
    """Without compilers first, so that M48 is measured whatever torch.compile takes."""
    found = gpu.cases(gpu.ARCHS, gpu.BATCHES, True)
    assert len(found) == 20 + 2 and len(set(found)) == 22
    assert found[:4] == [("s12", 256, False), ("s12", 1, False), ("m48", 256, False), ("m48", 1, False)]
    assert [case for case in found if case[2]] == [("s12", 256, True), ("s12", 1, True)]
    assert not any(compiled for _, _, compiled in gpu.cases(gpu.ARCHS, gpu.BATCHES, False))


def test_what_takes_too_long_is_ended(bench_on_path: None) -> None:
    timing = module("gpu_timing")
    start = time.monotonic()

    def wait() -> None:
        with timing.at_most(0.2):
            while time.monotonic() < start + 30:
                time.sleep(0.01)

    with pytest.raises(timing.TimeIsUpError, match="not done after 0 s"):
        wait()
    assert time.monotonic() < start + 10
    with timing.at_most(30):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
