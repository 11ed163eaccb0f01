"""The command line as a whole: help, streams, exit codes; info, verify and bench."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import riformer
import torch
from riformer_cli import _output, bench, info, main, parser
from support_cli import COMMANDS, EXACT, ROOT, Terminal, environment, tiny

import riformer_kernels
from riformer_kernels import backends, machine

# ------------------------------------------------------------------------------------------------- the tool as a whole


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert not err and f"riformer-kernels {command}" in out and "examples:" in out and "exit codes:" in out
    assert max(map(len, out.splitlines())) <= 100


def test_help_lists_every_command_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"    {command} " in out for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"riformer-kernels {riformer_kernels.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "frobnicate"),
        (["predict"], "IMAGE"),
        (["verify", "--dtype", "int16"], "float32, bfloat16, float16, int8"),
        (["verify", "--arch", "s12", "--checkpoint", "x"], "not allowed with"),
        (["bench", "--batch", "1,0"], "at least 1, found 0"),
        (["predict", "x.png", "--topk", "many"], "expected an integer, found 'many'"),
        (["predict", "x.png", "--mean", "1,b"], "numbers separated by commas"),
        (["predict", "x.png", "--crop-pct", "1.5"], "at most 1"),
        (["info", "--form", "json"], "unrecognized"),
    ],
)
def test_usage_errors_are_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and says in err and "Traceback" not in err


def _seconds_of_children() -> float:
    """Processor seconds of finished child processes. Unlike the clock's, they do not grow with the load."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["bench", "--batch", "x"], 2),
        *(([name, "--help"], 0) for name in COMMANDS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_words_need_no_torch(arguments: list[str], code: int) -> None:
    """Help, version and usage errors come at once: what takes seconds to import is imported by commands that run."""
    program = (
        f"import sys; from riformer_cli import main; code = main({arguments!r})\n"
        "heavy = {'torch', 'numpy', 'rich', 'PIL', 'riformer', 'riformer_kernels'} & set(sys.modules)\n"
        "assert not heavy, sorted(heavy)\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", program]
    before = _seconds_of_children()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    seconds = _seconds_of_children() - before
    assert done.returncode == code, done.stderr
    assert seconds < 1, f"{seconds:.2f} s of the processor's time, expected about 0.2 s"


def test_the_script_and_python_m_are_this_command_line() -> None:
    scripts = re.search(r"^riformer-kernels = \"(\S+):(\S+)\"$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert getattr(importlib.import_module(scripts[1]), scripts[2]) is main
    done = subprocess.run(
        [sys.executable, "-m", "riformer_kernels", "--version"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == f"riformer-kernels {riformer_kernels.__version__}\n"


def test_python_m_and_a_reader_that_leaves() -> None:
    """``python -m riformer_kernels info | head -c0``: no traceback, and the shell's usual code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "riformer_kernels", "info"],
        env=environment(TERM="xterm"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 141 and err == ""


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "collect", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "riformer-kernels: interrupted\n")


def test_our_own_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "collect", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_errors_of_the_system_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise PermissionError(13, "Permission denied", "/some\x1b[31m/file")

    monkeypatch.setattr(info, "collect", fail)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "riformer-kernels: error: /some\\x1b[31m/file: Permission denied\n"


# -------------------------------------------------------------------------------------------------------- the streams


def on_terminal(monkeypatch: pytest.MonkeyPatch, arguments: list[str], no_color: str | None) -> tuple[int, str, str]:
    out, err = Terminal(), Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code = main(arguments)
    monkeypatch.undo()
    return code, out.getvalue(), err.getvalue()


def test_terminal_gets_colour_unless_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    for no_color, coloured in ((None, True), ("", True), ("1", False)):
        code, out, _ = on_terminal(monkeypatch, ["info"], no_color)
        assert code == 0 and ("\x1b[" in out) == coloured, no_color


def test_without_terminal_no_escape_codes(
    checkpoint: str, photos: Path, backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["info"])
    main(["predict", str(photos), "--checkpoint", checkpoint, *EXACT, "--no-patch"])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\r" not in out + err and "a.png" in out and "classifying" not in err


@pytest.mark.parametrize("rich", [True, False])
def test_progress_is_on_stderr_only(rich: bool, checkpoint: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)  # import fails
    arguments = ["predict", str(photos), "--checkpoint", checkpoint, *EXACT, "--no-patch", "--format", "json"]
    code, out, err = on_terminal(monkeypatch, arguments, None)
    assert code == 1 and len(json.loads(out)["images"]) == 3
    assert "classifying" in err and "4/4" in err and ("\x1b" in err) == rich


def test_document_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    _output.document({"a": [float("nan"), float("inf"), 1.5], "b": (2,)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": [2]}


# --------------------------------------------------------------------------------------------------------------- info


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["pillow"] == importlib.metadata.version("pillow")
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    rows = {row["name"]: row for row in found["backends"]}
    assert rows.keys() == backends.ALL.keys()
    assert rows["reference"]["usable"] and not rows["reference"]["chosen_by_auto"]
    assert rows["cpu"]["usable"] == (backends.cpu.unusable() is None) != bool(rows["cpu"]["why_not"])
    assert rows["cpu"]["instruction_sets"]["chosen"] == backends.cpu.isa_status()["chosen"]
    assert rows["cuda"]["built"] == (backends.cuda.not_built() is None)
    assert rows["cuda"]["architectures"] == backends.cuda.architectures()
    names = ["RIFORMER_CPU_ISA", "RIFORMER_CPU", "RIFORMER_CUDA", "RIFORMER_CUDA_ARCHITECTURES"]
    assert [v["name"] for v in found["environment"]] == names
    assert [v["name"] for v in found["environment"] if "run time" in v["read"]] == names[:1]


def test_info_shows_why_not_and_the_variables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {"chosen": None, "supported": [], "compiled": [], "features": {}, "error": None}
    monkeypatch.setattr(backends.cpu, "isa_status", lambda: nothing)
    broken = dataclasses.replace(backends.cpu.BACKEND, unusable=lambda: "RIFORMER_CPU=off: not built")
    monkeypatch.setitem(backends.ALL, "cpu", broken)
    monkeypatch.setenv("RIFORMER_CPU_ISA", "avx2-please")
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("cpu "))
    assert row[1:3] == ["no", "no"] and " ".join(row).endswith("RIFORMER_CPU=off: not built")
    assert next(line.split()[1] for line in lines if line.startswith("RIFORMER_CPU_ISA")) == "avx2-please"
    assert next(line.split()[1] for line in lines if line.startswith("RIFORMER_CPU ")) == "(unset)"


def test_cpu_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Example 9000 @ 3 GHz\nflags\t\t: fma avx2\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_name() == "Example 9000 @ 3 GHz"
    assert [name for name, there in info._features().items() if there] == ["avx2", "fma"]
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "nothing")
    assert machine.cpu_name() and info._features() == {}


# ------------------------------------------------------------------------------------------------------------- verify

QUICK = ["--image-size", "64", "--batch", "1"]


@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_verify_passes(norm: str, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    riformer.save_checkpoint(tiny(norm=norm), tmp_path / "tiny.safetensors")
    arguments = ["verify", "--checkpoint", str(tmp_path / "tiny.safetensors"), "--backend", backend, *QUICK]
    assert main([*arguments, "--dtype", "fp32,bf16,float16", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["model"]["norm"] == norm and found["model"]["form"] == "training-time"
    assert [result["dtype"] for result in found["results"]] == ["float32", "bfloat16", "float16"]
    for result in found["results"]:
        kinds = [(entry["kind"], entry["name"]) for entry in result["comparisons"]]
        assert ("network", "features norm6") in kinds and ("network", "logits") in kinds
        assert sum(kind == "branch" for kind, _ in kinds) == 8 and result["backend"].startswith(backend)
        for entry in result["comparisons"]:
            assert entry["limits"]["rms"] == (2 if result["dtype"] == "float32" else 1.25)
            assert 0 < entry["ours"]["rms"] < 0.1 and 0 < entry["eager"]["rms"] < 0.1


def test_verify_int8(checkpoint: str, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A bfloat16 model with int8 products, judged by int8's own limits."""
    arguments = ["verify", "--checkpoint", checkpoint, "--backend", backend, "--image-size", "96", "--dtype", "int8"]
    assert main([*arguments, "--format", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert found["dtype"] == "int8" and found["passed"]
    limits = {(entry["kind"], entry["name"]): entry["limits"]["rms"] for entry in found["comparisons"]}
    assert limits["network", "features norm6"] == 1.5 and limits["branch", "network.0.0"] == 4.5
    bfloat16 = [entry["ours"]["rms"] > 1.5 * entry["eager"]["rms"] for entry in found["comparisons"]]
    assert any(bfloat16), "computed in int8"


def test_verify_other_form_and_text(checkpoint: str, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", "--checkpoint", checkpoint, "--backend", backend, *QUICK, "--dtype", "float32", "--deploy"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "deployed, norm gn" in out and "features norm6" in out and "worst of 8" in out and "FAILED" not in out
    assert f"float32 on {backend}" in out and "/ 2" in out


def test_verify_fails_with_1(
    checkpoint: str, backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = backends.ALL[backend]
    wrong = dataclasses.replace(
        plain, ops={**plain.ops, "head": lambda *a: plain.ops["head"](*a) * 1.001}, prepare=None
    )
    monkeypatch.setitem(backends.ALL, backend, wrong)
    arguments = ["verify", "--checkpoint", checkpoint, "--backend", backend, *QUICK, "--dtype", "float32"]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.split()[:2] == ["float32", "logits"])
    assert row.endswith("FAILED") and "FAILED: logits, head at 96x96" in out
    assert next(line for line in out.splitlines() if "features" in line).endswith("passed")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arch", "s13"], "s12, s24"),
        (["--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--checkpoint", "riformer-s13_in1k"], "riformer-s12_in1k"),
        (["--backend", "warp"], "unknown backend 'warp'"),
    ],
)
def test_verify_bad_input_is_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments, "--dtype", "float32"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("riformer-kernels: error: ") and says in err


# -------------------------------------------------------------------------------------------------------------- bench


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "random_model", lambda arch, seed, **options: tiny(seed, **options))


BENCH = ["bench", "--image-size", "64", "--batch", "1,2", "--dtype", "float32", "--seconds", "0.05"]


@pytest.mark.usefixtures("small_bench")
def test_bench_json(backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = torch.get_num_threads(), []
    # Noted, not done: more threads than the machine has free take a minute for what takes a second.
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert main([*BENCH, "--backend", backend, "--threads", "2", "--format", "json"]) == 0
    assert threads == [2, before]
    found = json.loads(capsys.readouterr().out)
    assert (
        found["machine"]["threads"] == before
        and "inference_mode" in found["timed"]
        and "forward only" in found["timed"]
    )
    assert [(r["dtype"], r["batch"]) for r in found["results"]] == [("float32", 1), ("float32", 2)]
    for result in found["results"]:
        rows = {row["variant"]: row for row in result["rows"]}
        assert rows.keys() == {"eager NCHW", "eager channels_last", "patched"} and result["rounds"] >= 5
        assert rows["patched"]["served_by"].startswith(backend)
        for row in rows.values():
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["images_per_s"] == pytest.approx(1e3 * result["batch"] / row["median_ms"])
        best = rows[result["best_peer"]]
        assert best["vs_best_peer"] == 1 and best["median_ms"] == min(
            rows[n]["median_ms"] for n in rows if n != "patched"
        )
        assert rows["patched"]["vs_best_peer"] == pytest.approx(best["median_ms"] / rows["patched"]["median_ms"])


@pytest.mark.usefixtures("small_bench")
def test_bench_text_and_a_compiler_that_fails(
    backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: torch.nn.Module, **_options: object):
        def call(x: torch.Tensor) -> None:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert main([*BENCH, "--backend", backend, "--compile"]) == 1
    out, err = capsys.readouterr()
    assert "torch.compile cannot be measured here: RuntimeError: no C++ compiler" in err
    assert "patched" in out and "vs best peer" in out and out.count("x the best peer (eager") == 2


@pytest.mark.usefixtures("small_bench")
def test_bench_verifies_first(
    backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = backends.ALL[backend]
    monkeypatch.setitem(
        backends.ALL,
        backend,
        dataclasses.replace(plain, ops={**plain.ops, "head": lambda *a: plain.ops["head"](*a) * 1.001}, prepare=None),
    )
    assert main([*BENCH, "--backend", backend]) == 1
    out, err = capsys.readouterr()
    assert not out and "error-ratio rule" in err


def test_bench_unknown_arch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--arch", "s13"]) == 2
    assert "s12, s24" in capsys.readouterr().err


def test_every_option_has_help() -> None:
    for sub in parser()._subparsers._group_actions[0].choices.values():
        assert all(action.help for action in sub._actions)
