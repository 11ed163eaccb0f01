"""Workers time themselves, say why they cannot, and leave nothing behind. Limits on instruction sets reach them."""

from __future__ import annotations

import os
import platform
import re

import pytest
from support_bench import module

from riformer_kernels.errors import BackendError


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_worker_times_itself_where_it_was_told_to() -> None:
    worker = module("worker")
    arguments = {"seconds": 0.02, "batches": 4}
    environment = {"RIFORMER_TEST": "yes"}
    with worker.Worker("naps", "support_bench:naps", arguments, threads=1, environment=environment) as made:
        assert made.facts["threads"] == 1 and made.facts["variable"] == "yes"
        # Four batches a call: the time of one, and neither the untimed call nor the settling is in it.
        assert 0.005 <= made.sample(3) < 0.015
        times, elsewhere = worker.take_turns({"naps": made}, 0.0, min_rounds=2)
        assert times["naps"].rounds == 2 and times["naps"].median >= 0.005
        assert elsewhere is None or 0 <= elsewhere <= 1
    assert gone(made.pid)
    made.close()  # once more does no harm


def test_worker_that_cannot_start_says_why() -> None:
    worker = module("worker")
    for target, arguments, reason in (
        ("support_bench:raises", {}, "ValueError: no such runtime"),
        ("support_bench:dies", {"where": "at once"}, r"exit code 3.*the last words"),
    ):
        with pytest.raises(worker.WorkerError, match=reason) as raised:
            worker.Worker("it", target, arguments)
        assert raised.value.name == "it"


def test_worker_that_dies_or_hangs_says_so() -> None:
    worker = module("worker")
    with worker.Worker("it", "support_bench:dies", {"where": "in the call"}) as made:
        with pytest.raises(worker.WorkerError, match="SIGKILL"):
            made.sample(1)
        with pytest.raises(worker.WorkerError, match="SIGKILL"):
            made.sample(1)
    with pytest.raises(worker.WorkerError, match=r"no answer in 0\.01 s"):
        worker.Worker("it", "support_bench:naps", {"seconds": 0}, limit=0.01)


# --------------------------------------------------------------------------------------------------- instruction sets


def test_limit_reaches_the_worker(native: None) -> None:
    isa, worker = module("isa"), module("worker")
    if isa.best() not in ("avx512", "avx512_bf16", "amx"):
        pytest.skip(f"nothing to take away: the best instruction set here is {isa.best()}")
    assert isa.below()[-1] == "avx2" and isa.environment(None) == {}
    environment = isa.environment("avx2")
    with worker.Worker("naps", "support_bench:naps", {"seconds": 0}, environment=environment) as made:
        assert made.facts["isa"] == "avx2" and made.facts["torch_isa"] == "AVX2"


def test_table_names_what_the_library_is_compiled_for(native: None) -> None:
    isa = module("isa")
    compiled = [name for name in isa.cpu.isa_status()["compiled"] if name in isa.TABLE]
    assert compiled == isa.cpu.isa_status()["compiled"], "the library has an instruction set that bench/isa.py lacks"
    here = "aarch64" if platform.machine() in ("aarch64", "arm64") else "x86"
    assert {name for name, entry in isa.TABLE.items() if entry.architecture in (here, "any")} == set(compiled)
    for name, entry in isa.TABLE.items():
        assert entry.hardware or not entry.environment, name
        assert bool(entry.environment) == bool(entry.march) == bool(entry.dtypes), name
        assert entry.environment.get("RIFORMER_CPU_ISA", name) == name
    x86 = [name for name in isa.HARDWARE if isa.TABLE[name].architecture == "x86"]
    assert set(x86[1:]) == set(isa.LIMITS), "all but the best set can be a limit"
    assert set(isa.HARDWARE) <= set(module("result_file").SETS), "a set without a name for readers"


def test_probe_and_table_name_the_same_instruction_sets() -> None:
    isa = module("isa")
    kinds = re.findall(r'^    \{"[a-z0-9]+-([a-z0-9_]+)"', module("peak").SOURCE.read_text(), re.MULTILINE)
    assert set(kinds) == set(isa.HARDWARE)


def test_limits_are_those_below_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = module("isa")
    for supported, below in (
        (["amx", "avx512_bf16", "avx512", "avx2", "scalar"], ["avx512_bf16", "avx512", "avx2"]),
        (["avx512_bf16", "avx512", "avx2", "amx-emulated", "scalar"], ["avx512", "avx2"]),
        (["avx512", "avx2", "scalar"], ["avx2"]),
        (["avx2", "scalar"], []),
        (["scalar"], []),
        (["neon_bf16", "neon", "scalar"], []),
    ):
        monkeypatch.setattr(isa.cpu, "isa_status", lambda supported=supported: {"supported": supported, "error": None})
        assert isa.below() == below
    assert isa.up_to("neon_bf16") == ("neon_bf16", "neon") and isa.up_to("avx2") == ("avx2",)


def test_missing_instruction_set_is_named_with_those_present(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    isa, compare = module("isa"), module("compare")
    status = {"supported": ["avx2", "scalar"], "error": None, "chosen": "avx2"}
    monkeypatch.setattr(isa.cpu, "isa_status", lambda: status)
    with pytest.raises(BackendError, match=r"'avx512' is not to be had.*avx2, scalar"):
        isa.check("avx512")
    assert compare.main(["--isa", "avx512"]) == 2
    assert "'avx512'" in capsys.readouterr().err
    # The same for what the environment forces, in the library's own words.
    status["error"] = "lacks amx_tile; expected one of avx2, scalar"
    monkeypatch.setattr(isa.cpu, "unusable", lambda: f"RIFORMER_CPU_ISA=amx: {status['error']}")
    assert compare.main([]) == 2
    assert "RIFORMER_CPU_ISA=amx: lacks amx_tile; expected one of avx2, scalar" in capsys.readouterr().err
