"""Timing in turns, on fake clocks: percentiles, the order of the rounds, ratios."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from riformer_kernels import timing


class Machine:
    """A fake clock, and functions that take a known time on it."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def clock(self) -> float:
        return self.now

    def function(self, name: str, *seconds: float) -> Callable[[], None]:
        calls = iter(range(10**6))

        def call() -> None:
            self.order.append(name)
            self.now += seconds[min(next(calls), len(seconds) - 1)]

        return call


def test_percentile_interpolates() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    found = [timing.percentile(values, share) for share in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert found == pytest.approx([1.0, 1.8, 3.0, 4.2, 5.0])
    assert timing.percentile([7.0], 0.2) == 7.0


def test_samples_have_interpolated_percentiles() -> None:
    samples = timing.Samples(tuple(float(value) for value in (6, 1, 2, 5, 3, 4)))
    assert (samples.median, samples.p20, samples.p80, samples.best, samples.rounds) == (3.5, 2.0, 5.0, 1.0, 6)
    assert samples.spread == pytest.approx(3 / 3.5)
    assert samples.per_second(7) == pytest.approx((2.0, 1.4, 3.5))


def test_interleave_rotates_and_counts_rounds() -> None:
    machine = Machine()
    functions = {"a": machine.function("a", 1.0), "b": machine.function("b", 2.0), "c": machine.function("c", 3.0)}
    found = timing.interleave(functions, 20.0, min_rounds=3, warmup=2, clock=machine.clock)
    assert machine.order[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = ["".join(machine.order[at : at + 3]) for at in range(6, len(machine.order), 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]  # 6 s each: the one that passes 20 s is finished
    assert {name: samples.seconds for name, samples in found.items()} == {
        "a": (1.0,) * 4, "b": (2.0,) * 4, "c": (3.0,) * 4,
    }  # fmt: skip


def test_interleave_makes_the_least_rounds_however_long_they_take() -> None:
    machine = Machine()
    found = timing.interleave({"a": machine.function("a", 9.0)}, 0.0, min_rounds=5, clock=machine.clock)
    assert found["a"].rounds == 5


def test_interleave_repeats_what_is_too_short_for_the_clock() -> None:
    machine = Machine()
    short = machine.function("short", 1e-4)
    found = timing.interleave({"short": short}, 0.0, warmup=1, shortest=1e-3, clock=machine.clock)
    assert len(machine.order) == 1 + 5 * 10
    assert found["short"].median == pytest.approx(1e-4)


def test_interleave_waits_for_the_device_before_each_reading() -> None:
    machine = Machine()
    wait = machine.function("wait", 0.5)  # as a queue of work that a call only started
    found = timing.interleave({"a": machine.function("a", 1.0)}, 0.0, synchronize=wait, clock=machine.clock)
    assert found["a"].median == 1.5


def test_interleave_lets_exceptions_pass_and_turns_the_collector_on_again() -> None:
    machine, state = Machine(), []

    def fails() -> None:
        state.append(gc.isenabled())
        machine.now += 1.0
        if len(state) > 3:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        timing.interleave({"a": fails}, 1.0, clock=machine.clock)
    assert state == [False] * 4 and gc.isenabled()


def test_ratio_is_the_median_of_the_rounds() -> None:
    # The machine is ten times slower from the third round on: the pairs do not care, the medians would.
    ours, peer = timing.Samples((1.0, 1.0, 10.0, 10.0, 10.0)), timing.Samples((2.0, 2.0, 2.0, 20.0, 20.0))
    assert timing.ratio(ours, peer).median == 2.0
    assert timing.ratio(ours, peer).p20 == pytest.approx(1.64)
    with pytest.raises(ValueError, match="5 rounds against 1"):
        timing.ratio(ours, timing.Samples((1.0,)))


def test_interleave_makes_the_most_rounds_at_most() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleave(contenders, 60.0, min_rounds=2, max_rounds=3, warmup=1, shortest=0.0)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert [times[name].rounds for name in "abc"] == [3, 3, 3]
    one, two = timing.Samples((1.0, 2.0, 4.0)), timing.Samples((3.0, 4.0, 4.0))
    assert one.median == 2.0 and timing.ratio(one, two).median == 2.0 and one.spread == pytest.approx(0.9)
