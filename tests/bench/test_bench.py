"""The benchmark's own code: verdicts, what it was measured on, peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support_bench import BENCH, module

from riformer_kernels.timing import Samples


def test_verdict_is_withheld_when_noisy() -> None:
    verdict = module("verdict")
    calm, twice = Samples((1.0, 1.01, 0.99, 1.0, 1.02)), Samples((2.0, 2.01, 1.99, 2.0, 2.02))
    noisy = Samples((2.0, 3.0, 1.9, 3.0, 2.0))
    assert noisy.spread > 0.25
    assert verdict.verdict(calm, twice) == "faster"
    assert verdict.verdict(twice, calm) == "slower"
    assert verdict.verdict(calm, Samples(calm.seconds[::-1])) == "even"
    assert verdict.verdict(calm, noisy) == verdict.verdict(noisy, twice) == verdict.TOO_NOISY
    assert verdict.verdict(calm, twice, elsewhere=0.01) == "faster"
    assert verdict.verdict(calm, twice, elsewhere=0.5) == verdict.TOO_NOISY


# ----------------------------------------------------------------------------------------------------- machine, memory


def test_machine_says_what_counts_and_nothing_private(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    monkeypatch.setenv("OMP_WAIT_POLICY", "active")

    found = module("machine").machine()
    text = json.dumps(found)
    for key in (
        "cpu",
        "cores",
        "flags",
        "caches",
        "isa",
        "numpy",
        "python",
        "torch",
        "torch_threads",
        "commit",
        "dirty",
    ):
        assert key in found
    assert found["torch_threads"] == 1 and found["cores"] >= 1
    assert found["environment"]["OMP_WAIT_POLICY"] == "active"
    assert str(BENCH.parent) not in text and str(Path.home()) not in text and f'"{platform.node()}"' not in text


def test_elsewhere_is_a_share() -> None:
    machine = module("machine")
    with machine.Elsewhere() as elsewhere:
        sum(range(10**6))
    assert elsewhere.share is None or 0 <= elsewhere.share <= 1
    with machine.Elsewhere([2**22 + 1]) as elsewhere:  # above the largest process id
        pass
    assert elsewhere.share is None


def test_elsewhere_does_not_count_the_given_processes() -> None:
    machine = module("machine")
    spin = "import time\nuntil = time.monotonic() + 60\nwhile time.monotonic() < until: pass"
    other = subprocess.Popen([sys.executable, "-c", spin])
    try:
        with machine.Elsewhere() as counted, machine.Elsewhere([other.pid]) as left_out:
            time.sleep(0.6)
    finally:
        other.kill()
        other.wait()
    if counted.share is None:
        pytest.skip("this system has no /proc/stat")
    # One of n processors, or its share of them where others are busy too.
    assert counted.share - left_out.share > 0.2 / len(os.sched_getaffinity(0))


def test_peak_memory_counts_what_one_call_needs() -> None:
    memory = module("memory")
    found = memory.peak_memory("support_bench:buffers", {"megabytes": 16}, 3, small=4, threads=1)
    failed = memory.peak_memory("support_bench:missing", {}, 1)
    # What the larger call before it freed does not hide it.
    if found.method == "VmHWM":
        assert found.reason is None and found.extra_bytes == pytest.approx(48 << 20, rel=0.1)
    else:
        assert found.reason
    assert failed.extra_bytes is None and "missing" in failed.reason


def test_memory_falls_back_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = module("memory")
    reason = "the peak counter cannot be reset here (PermissionError)"
    pytest.importorskip("psutil")
    memory, _ = measured._sampled(lambda: torch.ones(8 << 20), reason)
    assert memory.method == "sampled" and memory.reason.startswith(reason) and memory.extra_bytes >= 0
    monkeypatch.setitem(sys.modules, "psutil", None)
    memory, _ = measured._sampled(lambda: None, reason)
    assert memory.extra_bytes is None and "psutil" in memory.reason
