"""The benchmark's own code: statistics on fake clocks, peers that compute the model's function, result files."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from riformer_kernels.backends import cpu

BENCH = Path(__file__).resolve().parent.parent / "bench"
TINY = {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64]}


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    """The modules of bench/ import each other by their bare names, as scripts do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))
    for name in ("harness", "machine", "measure", "op_cases", "peers", "record"):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def native() -> None:
    reason = cpu.unusable()
    if reason:
        pytest.skip(reason)


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
    assert state == [True, True, False, False] and gc.isenabled()


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


def test_machine_says_what_counts_and_nothing_private() -> None:
    import platform

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
    assert str(BENCH.parent) not in text and str(Path.home()) not in text and f'"{platform.node()}"' not in text


def test_elsewhere_is_a_share() -> None:
    with module("machine").Elsewhere() as elsewhere:
        sum(range(10**6))
    assert elsewhere.share is None or 0 <= elsewhere.share <= 1


def buffers(megabytes: int):
    """A subject for the memory test: a call at batch n touches n buffers of so many MB and frees them."""
    return lambda batch: lambda: [torch.ones(megabytes << 18) for _ in range(batch)] and None


def test_peak_memory_counts_what_one_call_needs() -> None:
    harness = module("harness")
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        found = harness.peak_memory("test_bench:buffers", {"megabytes": 16}, 3, small=4, threads=1)
        failed = harness.peak_memory("test_bench:missing", {}, 1)
    finally:
        sys.path.remove(str(Path(__file__).parent))
    # What the larger call before it freed does not hide it.
    if found.method == "VmHWM":
        assert found.reason is None and found.extra_bytes == pytest.approx(48 << 20, rel=0.1)
    else:
        assert found.reason
    assert failed.extra_bytes is None and "missing" in failed.reason


def test_memory_falls_back_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = module("harness")
    reason = "the peak counter cannot be reset here (PermissionError)"
    pytest.importorskip("psutil")
    memory, _ = harness._sampled(lambda: torch.ones(8 << 20), reason)
    assert memory.method == "sampled" and memory.reason.startswith(reason) and memory.extra_bytes >= 0
    monkeypatch.setitem(sys.modules, "psutil", None)
    memory, _ = harness._sampled(lambda: None, reason)
    assert memory.extra_bytes is None and "psutil" in memory.reason


# ------------------------------------------------------------------------------------------------------------ peers


def test_token_form_is_the_model() -> None:
    peers = module("peers")
    model = peers.random_model(TINY)
    form = peers.token_form(model)  # asserts equality in float64
    x = peers.random_images(2, 64)
    with torch.inference_mode():
        assert torch.allclose(form(x), model(x), rtol=0, atol=1e-4)


def test_token_form_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = module("peers")
    monkeypatch.setattr(peers.F, "gelu", lambda x: 0.999 * torch.nn.functional.silu(x))
    model = peers.random_model(TINY)
    monkeypatch.setattr(torch.nn.GELU, "forward", lambda self, x: x.relu())
    with pytest.raises(AssertionError, match="rewritten model differs"):
        peers.token_form(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_compute_the_model(native: None, dtype: torch.dtype) -> None:
    peers = module("peers")
    subject = peers.Subject(peers.random_model(TINY, dtype), peers.random_images(1, 64, dtype))
    judge = peers.Judge(subject)
    for name in peers.names(compiled=False):
        peer = peers.build(name, subject)
        assert peer.reason is None and peer.detail
        ratios = judge.ratios(peer)
        assert ratios.rms < 2, name  # any peer of another function is orders of magnitude off
    assert peers.names()[0] == "ours" and set(peers.names()) - set(peers.names(compiled=False)) == set(peers.COMPILED)


def test_ours_is_asserted_and_peers_are_reported(native: None) -> None:
    peers = module("peers")
    subject = peers.Subject(peers.random_model(TINY), peers.random_images(4, 32))
    judge = peers.Judge(subject)
    wrong = peers.Peer("eager", peers.UNCHANGED, lambda x: subject.model(x) * 1.01, peers.NCHW, "")
    assert not judge.ratios(wrong).passed
    with pytest.raises(AssertionError, match="not accurate enough"):
        judge.ratios(peers.Peer(peers.OURS, peers.UNCHANGED, wrong.run, peers.NCHW, ""))


@pytest.mark.parametrize("op", ["block", "embed", "norm", "head", "moments"])
def test_op_cases_hold_the_error_rule(native: None, op: str) -> None:
    op_cases = module("op_cases")
    cases = op_cases.cases(op, (torch.float32,), (1,))
    assert len(cases) == len(op_cases.SHAPES[op])
    op_cases.build(cases[-1]).check()


def test_op_check_notices_a_wrong_result(native: None) -> None:
    import dataclasses

    op_cases = module("op_cases")
    for op in ("norm", "moments"):
        built = op_cases.build(op_cases.cases(op, (torch.float32,), (1,))[-1])
        wrong = dataclasses.replace(built, ours=lambda x, moments, ours=built.ours: ours(x, moments) * 1.00001)
        with pytest.raises(AssertionError, match=op):
            wrong.check()


# ----------------------------------------------------------------------------------------------------------- record

MODEL_KEYS = {
    "kind", "arch", "size", "batch", "dtype", "device", "isa", "threads", "peer", "form", "detail", "reason", "rounds",
    "ms", "images_per_s", "images_per_s_p20", "images_per_s_p80", "ratio", "ratio_p20", "ratio_p80", "verdict", "spread",
    "error_max", "error_rms", "error_ratio_rms", "error_passed", "extra_memory_bytes", "memory_ratio", "memory_method",
    "memory_reason", "gflop_per_s", "ceiling_share", "elsewhere",
}  # fmt: skip


def test_record_writes_valid_lines(
    native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, measure, op_cases, peers = map(module, ("record", "measure", "op_cases", "peers"))

    def broken(subject: object) -> object:
        raise OSError("no such runtime")

    monkeypatch.setattr(measure, "CEILING_SIDE", 64)
    monkeypatch.setattr(op_cases, "SHAPES", {"norm": ((512, 7),)})
    monkeypatch.setitem(peers.FACTORIES, "eager_linear", (peers.REWRITTEN, broken))
    out = tmp_path / "results" / "tiny.jsonl"
    arguments = ["--quick", "--no-compile", "--arch", json.dumps(TINY), "--size", "64", "--batch", "2"]
    assert record.main([*arguments, "--dtype", "float32", "--seconds", "0.1", "--threads", "2", "--out", str(out)]) == 0
    assert torch.get_num_threads() == 1, "thread settings are as they were"

    head, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(out.parent.iterdir()) == [out]
    assert head["kind"] == "header" and head["torch_threads"] == 2 and head["settings"]["quick"] is True
    kinds = [row["kind"] for row in rows]
    assert kinds == ["ceiling"] + 4 * ["model"] + 3 * ["op"]
    assert rows[0]["tflop_per_s"] > 0 and "not a hardware peak" in rows[0]["note"]

    models = {row["peer"]: row for row in rows if row["kind"] == "model"}
    assert list(models) == ["ours", "eager", "eager_channels_last", "eager_linear"]
    assert all(MODEL_KEYS <= set(row) for row in models.values())
    assert models["eager_linear"]["reason"] == "OSError: no such runtime" and models["eager_linear"]["ms"] is None
    for name in ("eager", "eager_channels_last"):
        row = models[name]
        assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] and row["verdict"]
        assert row["images_per_s_p20"] <= row["images_per_s"] <= row["images_per_s_p80"]
        assert row["extra_memory_bytes"] is not None or row["memory_reason"]
    assert models["ours"]["ratio"] is None and models["ours"]["error_passed"] is True
    assert models["ours"]["error_ratio_rms"] > 0 and models["ours"]["ceiling_share"] > 0
    ops = [row for row in rows if row["kind"] == "op"]
    assert [row["peer"] for row in ops] == ["ours", "eager", "eager_channels_last"]
    assert ops[0]["shape"] == [1, 512, 7, 7] and ops[0]["gbyte_per_s"] > 0 and ops[0]["backend"] == "cpu"

    printed = capsys.readouterr()
    assert (
        "eager_linear: OSError: no such runtime" in printed.out
        and "the best peer on the unchanged model" in printed.out
    )
    assert "[3/3]" in printed.err


def test_record_turns_what_json_lacks_into_null() -> None:
    record = module("record")
    assert json.loads(record._line({"a": math.inf, "b": math.nan, "c": 1.5})) == {"a": None, "b": None, "c": 1.5}


def test_record_rejects_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (["--batch", "0"], ["--dtype", "int8"], ["--threads", "-1"]):
        with pytest.raises(SystemExit):
            module("record").main(bad)
        assert bad[0] in capsys.readouterr().err
