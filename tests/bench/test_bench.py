"""The benchmark's own code: statistics and taking turns on fake clocks, what it was measured on, peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support_bench import BENCH, bench_on_path, module  # noqa: F401


class Machine:
    """A fake clock, and functions that take a known time on it."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def clock(self) -> float:
        return self.now

    def function(self, name: str, *seconds: float):
        calls = iter(range(10**6))

        def call() -> None:
            self.order.append(name)
            self.now += seconds[min(next(calls), len(seconds) - 1)]

        return call


# ----------------------------------------------------------------------------------------------------------- timing


def test_samples_have_interpolated_percentiles() -> None:
    samples = module("harness").Samples(tuple(float(value) for value in (6, 1, 2, 5, 3, 4)))
    assert (samples.median, samples.p20, samples.p80, samples.best, samples.rounds) == (3.5, 2.0, 5.0, 1.0, 6)
    assert samples.spread == pytest.approx(3 / 3.5)
    assert samples.per_second(7) == pytest.approx((2.0, 1.4, 3.5))


def test_interleave_rotates_and_counts_rounds() -> None:
    machine = Machine()
    functions = {"a": machine.function("a", 1.0), "b": machine.function("b", 2.0), "c": machine.function("c", 3.0)}
    found = module("harness").interleave(functions, 20.0, min_rounds=3, warmup=2, clock=machine.clock)
    assert machine.order[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = ["".join(machine.order[at : at + 3]) for at in range(6, len(machine.order), 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]  # 6 s each: the one that passes 20 s is finished
    assert {name: samples.seconds for name, samples in found.items()} == {
        "a": (1.0,) * 4, "b": (2.0,) * 4, "c": (3.0,) * 4,
    }  # fmt: skip


def test_interleave_makes_the_least_rounds_however_long_they_take() -> None:
    machine = Machine()
    found = module("harness").interleave({"a": machine.function("a", 9.0)}, 0.0, min_rounds=5, clock=machine.clock)
    assert found["a"].rounds == 5


def test_interleave_repeats_what_is_too_short_for_the_clock() -> None:
    machine = Machine()
    short = machine.function("short", 1e-4)
    found = module("harness").interleave({"short": short}, 0.0, warmup=1, shortest=1e-3, clock=machine.clock)
    assert len(machine.order) == 1 + 5 * 10
    assert found["short"].median == pytest.approx(1e-4)


def test_interleave_waits_for_the_device_before_each_reading() -> None:
    machine = Machine()
    wait = machine.function("wait", 0.5)  # as a queue of work that a call only started
    found = module("harness").interleave({"a": machine.function("a", 1.0)}, 0.0, synchronize=wait, clock=machine.clock)
    assert found["a"].median == 1.5


def test_interleave_lets_exceptions_pass_and_turns_the_collector_on_again() -> None:
    import gc

    machine, state = Machine(), []

    def fails() -> None:
        state.append(gc.isenabled())
        machine.now += 1.0
        if len(state) > 3:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        module("harness").interleave({"a": fails}, 1.0, clock=machine.clock)
    assert state == [False] * 4 and gc.isenabled()


def test_ratio_is_the_median_of_the_rounds() -> None:
    harness = module("harness")
    # The machine is ten times slower from the third round on: the pairs do not care, the medians would.
    ours, peer = harness.Samples((1.0, 1.0, 10.0, 10.0, 10.0)), harness.Samples((2.0, 2.0, 2.0, 20.0, 20.0))
    assert harness.ratio(ours, peer).median == 2.0
    assert harness.ratio(ours, peer).p20 == pytest.approx(1.64)
    with pytest.raises(ValueError, match="5 rounds against 1"):
        harness.ratio(ours, harness.Samples((1.0,)))


def test_verdict_is_withheld_when_noisy() -> None:
    harness = module("harness")
    calm, twice = harness.Samples((1.0, 1.01, 0.99, 1.0, 1.02)), harness.Samples((2.0, 2.01, 1.99, 2.0, 2.02))
    noisy = harness.Samples((2.0, 3.0, 1.9, 3.0, 2.0))
    assert noisy.spread > 0.25
    assert harness.verdict(calm, twice) == "faster"
    assert harness.verdict(twice, calm) == "slower"
    assert harness.verdict(calm, harness.Samples(calm.seconds[::-1])) == "even"
    assert harness.verdict(calm, noisy) == harness.verdict(noisy, twice) == harness.TOO_NOISY
    assert harness.verdict(calm, twice, elsewhere=0.01) == "faster"
    assert harness.verdict(calm, twice, elsewhere=0.5) == harness.TOO_NOISY


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
