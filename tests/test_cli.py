"""The command line: results, exit codes, bad input, and what goes to which stream."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from support_riformer import one_thread  # noqa: F401

import riformer
import riformer_kernels
from riformer_kernels import backends
from riformer_kernels.cli import _images, _output, bench, info, main, parser

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("info", "verify", "predict", "convert", "bench")
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
EXACT = ["--image-size", "32", "--crop-pct", "1"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tiny(seed: int = 0, **options: object) -> torch.nn.Module:
    return riformer.randomize_(riformer.RIFormer(TINY, **{"num_classes": 10, **options}), seed).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    riformer.save_checkpoint(tiny(), tmp_path / "tiny.safetensors")
    return str(tmp_path / "tiny.safetensors")


def pixels(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three good images and a truncated one."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.png", "deeper/c.png")):
        Image.fromarray(pixels(index)).save(folder / name)
    whole = io.BytesIO()
    Image.fromarray(pixels(9)).save(whole, "PNG")
    (folder / "bad.png").write_bytes(whole.getvalue()[:800])
    return folder


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    return {**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "PYTHONPATH": path, **more}


def softmax(model: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    """Plain PyTorch on [B, H, W, C] bytes, with ImageNet's mean and std."""
    x = (torch.tensor(images).double() / 255 - torch.from_numpy(MEAN)) / torch.from_numpy(STD)
    with torch.inference_mode():
        return model(x.permute(0, 3, 1, 2).float().contiguous()).softmax(-1)


def probabilities(image: dict) -> list[float]:
    return [entry["probability"] for entry in sorted(image["predictions"], key=lambda entry: entry["class"])]


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
        (["verify", "--dtype", "int8"], "float32, bfloat16, float16"),
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


def test_help_needs_no_torch() -> None:
    """With the package's own ``__init__`` out of the way: the command line's modules import torch only to run."""
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('riformer_kernels'); package.__path__ = [{str(ROOT / 'riformer_kernels')!r}]\n"
        "sys.modules['riformer_kernels'] = package\n"
        "from riformer_kernels.cli import main\n"
        "assert main(['predict', '--help']) == 0 and main(['bench', '--batch', 'x']) == 2\n"
        "heavy = sorted({'torch', 'numpy', 'rich', 'PIL', 'riformer'} & set(sys.modules)); assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


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
def test_progress_is_on_stderr_only(
    rich: bool, checkpoint: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert [v["name"] for v in found["environment"]] == ["RIFORMER_CPU_ISA", "RIFORMER_CPU"]


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
    monkeypatch.setattr(info, "CPUINFO", tmp_path / "cpuinfo")
    assert info.cpu_model() == "Example 9000 @ 3 GHz"
    assert [name for name, there in info._features().items() if there] == ["avx2", "fma"]
    monkeypatch.setattr(info, "CPUINFO", tmp_path / "nothing")
    assert info.cpu_model() and info._features() == {}


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
    wrong = dataclasses.replace(plain, head=lambda *a: plain.head(*a) * 1.001)
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


# ------------------------------------------------------------------------------------------------------------ predict


def test_predict_is_the_model_on_the_pixels(
    checkpoint: str, photos: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corrupt image among good ones: named with the reason, the others classified, exit code 1."""
    arguments = ["predict", str(photos), "--checkpoint", checkpoint, *EXACT, "--topk", "99", "--batch-size", "2"]
    assert main([*arguments, "--backend", backend, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    names = [Path(image["image"]).name for image in found["images"]]
    assert names == ["a.png", "b.png", "c.png"] and found["model"]["backend"].startswith(backend)
    assert [Path(entry["image"]).name for entry in found["failed"]] == ["bad.png"] and found["failed"][0]["reason"]
    assert "bad.png: " in err and "3 images classified" in err and "Traceback" not in err
    expected = softmax(tiny(), np.stack([pixels(index) for index in range(3)]))
    for image, row in zip(found["images"], expected):
        assert probabilities(image) == pytest.approx(row.tolist(), abs=2e-4)
        ranked = [entry["probability"] for entry in image["predictions"]]
        assert ranked == sorted(ranked, reverse=True) and len(ranked) == 10


def test_predict_resizes_and_crops(tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(pixels(3, 50, 80)).save(tmp_path / "wide.png")
    arguments = ["predict", str(tmp_path / "wide.png"), "--checkpoint", checkpoint, "--image-size", "32", "--topk", "10"]
    assert main([*arguments, "--no-patch", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preprocessing"]["resize"] == 34 and found["model"]["backend"].startswith("plain")
    resized = Image.fromarray(pixels(3, 50, 80)).resize((54, 34), Image.Resampling.BICUBIC)
    expected = softmax(tiny(), np.asarray(resized.crop((11, 1, 43, 33)))[None])[0]
    assert probabilities(found["images"][0]) == pytest.approx(expected.tolist(), abs=1e-5)


def test_predict_csv_labels_globs(
    checkpoint: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bad.png").unlink()
    (tmp_path / "labels.txt").write_text("".join(f'class "{index}", really\n' for index in range(10)))
    arguments = ["predict", str(photos / "**/*.png"), "--checkpoint", checkpoint, *EXACT, "--no-patch", "--topk", "2"]
    assert main([*arguments, "--format", "csv", "--labels", str(tmp_path / "labels.txt")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["image", "rank", "class", "label", "probability"]
    ranked = [(name, rank) for name in ("a.png", "b.png", "c.png") for rank in "12"]
    assert [(Path(row["image"]).name, row["rank"]) for row in rows] == ranked
    assert all(row["label"] == f'class "{row["class"]}", really' for row in rows)
    best = softmax(tiny(), pixels(1)[None])[0].topk(2)
    assert [int(row["class"]) for row in rows[2:4]] == best.indices.tolist()
    assert float(rows[2]["probability"]) == pytest.approx(best.values[0].item(), abs=1e-5)


def test_predict_text_and_hostile_name(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(pixels(0)).save(tmp_path / "x\x1b[31m[b].png")
    arguments = ["predict", str(tmp_path / "x\x1b[31m[b].png"), "--checkpoint", checkpoint, *EXACT, "--no-patch"]
    assert main([*arguments, "--topk", "1"]) == 0
    out, err = capsys.readouterr()
    best = softmax(tiny(), pixels(0)[None])[0].max(0)
    assert "x\\x1b[31m[b].png" in out and out.split()[-1] == str(best.indices.item()) and err == ""
    assert f"{100 * best.values.item():.2f} %" in out


def test_predict_half_precision_is_close(
    checkpoint: str, photos: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", str(photos / "a.png"), "--checkpoint", checkpoint, *EXACT, "--topk", "10", "--format", "json"]
    assert main([*arguments, "--dtype", "bfloat16", "--backend", backend]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = softmax(tiny(), pixels(0)[None])[0]
    assert found["model"]["dtype"] == "bfloat16"
    assert probabilities(found["images"][0]) == pytest.approx(expected.tolist(), abs=0.05)
    assert probabilities(found["images"][0]) != pytest.approx(expected.tolist(), abs=1e-7)


def test_predict_grey_and_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One input channel, preprocessing and labels from the checkpoint, and the LayerNorm that no tensor tells."""
    model = tiny(in_channels=1, norm="ln")
    metadata = {"image_size": "32", "crop_pct": "1", "mean": "0.1", "std": "[0.5]"}
    metadata["labels"] = json.dumps([f"digit {index}" for index in range(10)])
    riformer.save_checkpoint(model, tmp_path / "grey.safetensors", metadata=metadata)
    grey = pixels(5)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "eight.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    images = [str(tmp_path / "eight.png"), str(tmp_path / "sixteen.png")]
    assert main(["predict", *images, "--checkpoint", str(tmp_path / "grey.safetensors"), "--no-patch", "--topk", "10",
                 "--format", "json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    with torch.inference_mode():
        expected = model((torch.from_numpy(grey).float()[None, None] / 255 - 0.1) / 0.5).softmax(-1)[0].tolist()
    for image in found["images"]:
        assert probabilities(image) == pytest.approx(expected, abs=1e-5)
        assert all(entry["label"] == f"digit {entry['class']}" for entry in image["predictions"])


def test_predict_nothing_readable(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    names = ["text.jpg", "empty.png", "folder", "missing.png", "none*.png"]
    arguments = ["predict", *(str(tmp_path / name) for name in names), "--checkpoint", checkpoint, "--no-patch"]
    assert main([*arguments, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    reasons = {Path(entry["image"]).name: entry["reason"] for entry in json.loads(out)["failed"]}
    assert reasons == {
        "text.jpg": "not an image that Pillow can read", "empty.png": "empty file (0 bytes)",
        "folder": "there are no images in this folder", "missing.png": "No such file or directory",
        "none*.png": "nothing matches this pattern",
    }  # fmt: skip
    assert all(f"{name}: {reason}" in err for name, reason in reasons.items()) and "0 images classified" in err


def test_predict_not_finite(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    with torch.no_grad():
        model.head.fc.bias[3] = float("nan")
    riformer.save_checkpoint(model, tmp_path / "nan.safetensors")
    arguments = ["predict", str(photos / "a.png"), "--checkpoint", str(tmp_path / "nan.safetensors"), *EXACT]
    assert main([*arguments, "--no-patch"]) == 1
    out, err = capsys.readouterr()
    assert not out and "not finite" in err


@pytest.mark.parametrize("arguments", [[], ["--arch", "s12"], ["--arch", "nonsense"]])
def test_predict_never_with_random_weights(
    arguments: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(photos), *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and "there are no weights" in err and "--checkpoint" in err and "riformer-s12_in1k" in err


def test_predict_published_name_downloads(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name alone fetches the weights, and brings its image size with it."""
    riformer.save_checkpoint(tiny(), tmp_path / "fetched.safetensors")
    asked = []
    monkeypatch.setattr(riformer, "download", lambda name: asked.append(name) or tmp_path / "fetched.safetensors")
    arguments = ["predict", str(photos / "a.png"), "--no-patch", "--format", "json"]
    assert main([*arguments, "--checkpoint", "riformer-s12_384_in1k"]) == 0
    assert asked == ["riformer-s12_384_in1k"]
    assert json.loads(capsys.readouterr().out)["preprocessing"]["image_size"] == 384
    assert main([*arguments, "--arch", "riformer-s12_in1k"]) == 2  # what came is no s12
    assert asked[1:] == ["riformer-s12_in1k"] and "Leave --arch out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "arguments", "says"),
    [
        ({}, ["--arch", "s12"], "holds arch custom"),
        ({"num_classes": 0}, [], "without a classifier"),
        ({"in_channels": 5}, [], "5 channels"),
        ({}, ["--mean", "0.5"], "--mean has 1 values"),
        ({}, ["--std", "1,0,1"], "std positive"),
        ({}, ["--labels", "LABELS"], "3 names, the checkpoint has 10 classes"),
        ({}, ["--labels", "no-such-file"], "no-such-file"),
        ({}, ["--backend", "warp"], "--no-patch"),
    ],
)
def test_predict_bad_input_is_2(
    options: dict, arguments: list[str], says: str, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    riformer.save_checkpoint(tiny(**options), tmp_path / "c.safetensors")
    (tmp_path / "labels").write_text("a\nb\nc\n\n")
    arguments = [str(tmp_path / "labels") if a == "LABELS" else a for a in arguments]
    assert main(["predict", str(photos / "a.png"), "--checkpoint", str(tmp_path / "c.safetensors"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("riformer-kernels: error: ") and says in err and "Traceback" not in err


def test_predict_without_pillow(
    checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert main(["predict", str(photos), "--checkpoint", checkpoint]) == 2
    assert "pip install 'riformer-kernels[cli]'" in capsys.readouterr().err


def test_image_modes(tmp_path: Path) -> None:
    """Palette, transparency, greyscale and EXIF rotation come out as the colours that they show."""
    how = _images.preprocessing(3, None, {}, image_size=32, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    upright = pixels(2)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "turned.png", exif=exif)
    grey = upright[:, :, :1].repeat(3, axis=2)
    Image.fromarray(grey).convert("L").save(tmp_path / "grey.png")
    palette = Image.fromarray(255 - upright[:, :, 0])
    palette.putpalette([value for index in range(256) for value in (255 - index,) * 3])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.dstack((upright, np.full((32, 32), 255, np.uint8)))).save(tmp_path / "alpha.png")
    for name, expected in (("turned", upright), ("grey", grey), ("palette", grey), ("alpha", upright)):
        found = _images.load(str(tmp_path / f"{name}.png"), how).transpose(1, 2, 0) * 255
        assert np.abs(found - expected).max() < 1e-3, name
    Image.fromarray(np.ones((32, 32), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(_images.Unreadable, match="mode F"):
        _images.load(str(tmp_path / "float.tiff"), how)


@pytest.mark.parametrize(("arch", "size", "resize"), [("s12", 224, 248), ("m36", 224, 236), ("s24", 384, 426),
                                                      ("m48", 384, 404), (None, 224, 236), ("s12", 256, 269)])  # fmt: skip
def test_published_sizes_resize_as_evaluated(arch: str | None, size: int, resize: int) -> None:
    assert _images.preprocessing(3, arch, {}, image_size=size).resize == resize


def test_metadata_that_makes_no_sense() -> None:
    with pytest.raises(_output.CliError, match="--image-size overrides"):
        _images.preprocessing(3, None, {"image_size": "large"})
    with pytest.raises(_output.CliError, match="mean"):
        _images.preprocessing(3, None, {"mean": "[0.5, 0.5]"})
    assert _images.preprocessing(3, None, {"mean": "[0.5]"}, mean=(0.1, 0.2, 0.3)).mean == (0.1, 0.2, 0.3)


# ------------------------------------------------------------------------------------------------------------ convert


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_convert_pth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    state_dict = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state_dict, "ema_state_dict": {k: v + 1 for k, v in state_dict.items()}}, tmp_path / "m.pth")
    out_path = tmp_path / "m.safetensors"
    assert main(["convert", str(tmp_path / "m.pth"), str(out_path), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sha256"] == hashlib.sha256(out_path.read_bytes()).hexdigest()
    assert found["tensors"] == len(state_dict) and found["form"] == "training-time"
    assert found["parameters"] == riformer.count_parameters(model) and found["arch"].startswith("custom")
    loaded = riformer.load_checkpoint(out_path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())

    assert main(["convert", str(tmp_path / "m.pth"), str(out_path), "--which", "ema_state_dict"]) == 2
    assert "--force" in capsys.readouterr().err
    assert hashlib.sha256(out_path.read_bytes()).hexdigest() == found["sha256"]
    assert main(["convert", str(tmp_path / "m.pth"), str(out_path), "--which", "ema_state_dict", "--force"]) == 0
    out = capsys.readouterr().out
    assert hashlib.sha256(out_path.read_bytes()).hexdigest() in out and found["sha256"] not in out
    assert torch.equal(riformer.load_checkpoint(out_path)["head.fc.bias"], model.state_dict()["head.fc.bias"] + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pth", "m.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_deploy_keeps_function_dtype_and_metadata(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(norm="ln", norm_eps=1e-3).to(dtype)
    riformer.save_checkpoint(model, tmp_path / "in.safetensors", metadata={"mean": "[0.5, 0.5, 0.5]", "by": "me"})
    arguments = ["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--deploy"]
    assert main([*arguments, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name = str(dtype).removeprefix("torch.")
    assert found["folded"] == 8 and found["form"] == "deployed" and found["dtypes"] == [name]
    metadata = found["metadata"]
    assert (metadata["norm"], metadata["norm_eps"], metadata["form"]) == ("ln", "0.001", "deployed")
    assert (metadata["mean"], metadata["by"]) == ("[0.5, 0.5, 0.5]", "me")
    expected = model.switch_to_deploy().state_dict()
    loaded = riformer.load_checkpoint(tmp_path / "out.safetensors")
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[n], t) for n, t in expected.items())


def test_convert_notes_the_norm_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tiny(norm="ln").state_dict(), tmp_path / "m.pth")
    arguments = ["convert", str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors")]
    assert main(arguments) == 0
    assert "--norm ln" in capsys.readouterr().err and "norm" not in riformer.read_metadata(tmp_path / "m.safetensors")
    assert main([*arguments, "--norm", "ln", "--force"]) == 0
    assert capsys.readouterr().err == "" and riformer.read_metadata(tmp_path / "m.safetensors")["norm"] == "ln"


def test_convert_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "m.pth")
    assert main(["convert", str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors"), "--deploy"]) == 2
    assert "Only a RIFormer" in capsys.readouterr().err and not (tmp_path / "m.safetensors").exists()
    assert main(["convert", str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert "not recognised" in out and "no RIFormer" in err


def test_convert_refuses_a_malicious_pickle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": Malicious()}, "zip.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("zip.pth", "plain.pth"):
        assert main(["convert", name, "out.safetensors"]) == 2
        out, err = capsys.readouterr()
        assert not out and "system" in err and "nothing in it was executed" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pth", "zip.pth"]


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("missing.pth", "out.safetensors", "no checkpoint at missing.pth"),
        ("broken.safetensors", "out.safetensors", "damaged"),
        ("tiny.safetensors", "out.pth", "ends in .safetensors"),
        ("tiny.safetensors", ".", "is a directory"),
        ("tiny.safetensors", "nowhere/out.safetensors", "there is no folder nowhere"),
    ],
)
def test_convert_bad_input_is_2(
    source: str, target: str, says: str, checkpoint: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(checkpoint).parent)
    Path("broken.safetensors").write_bytes(Path(checkpoint).read_bytes()[:5000])
    assert main(["convert", source, target]) == 2
    out, err = capsys.readouterr()
    assert not out and says in err and not Path("out.safetensors").exists()


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
    assert found["machine"]["threads"] == before and "inference_mode" in found["timed"] and "forward only" in found["timed"]
    assert [(r["dtype"], r["batch"]) for r in found["results"]] == [("float32", 1), ("float32", 2)]
    for result in found["results"]:
        rows = {row["variant"]: row for row in result["rows"]}
        assert rows.keys() == {"eager NCHW", "eager channels_last", "patched"} and result["rounds"] >= 5
        assert rows["patched"]["served_by"].startswith(backend)
        for row in rows.values():
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["images_per_s"] == pytest.approx(1e3 * result["batch"] / row["median_ms"])
        best = rows[result["best_peer"]]
        assert best["vs_best_peer"] == 1 and best["median_ms"] == min(rows[n]["median_ms"] for n in rows if n != "patched")
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
    monkeypatch.setitem(backends.ALL, backend, dataclasses.replace(plain, head=lambda *a: plain.head(*a) * 1.001))
    assert main([*BENCH, "--backend", backend]) == 1
    out, err = capsys.readouterr()
    assert not out and "error-ratio rule" in err


def test_bench_unknown_arch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--arch", "s13"]) == 2
    assert "s12, s24" in capsys.readouterr().err


def test_percentile() -> None:
    assert [bench.percentile([4.0, 1.0, 3.0, 2.0, 5.0], share) for share in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx(
        [1.0, 1.8, 3.0, 4.2, 5.0]
    )
    assert bench.percentile([7.0], 0.2) == 7.0


def test_every_option_has_help() -> None:
    for sub in parser()._subparsers._group_actions[0].choices.values():
        assert all(action.help for action in sub._actions)
