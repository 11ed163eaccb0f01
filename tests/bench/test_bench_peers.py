"""Peers of the benchmark compute the model's function; those that are not there say why; ops hold the error rule."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from support_bench import TINY, module

from riformer_kernels import ops


def test_token_form_is_the_model() -> None:
    subject = module("subject")
    model = subject.random_model(TINY)
    form = module("token_form").token_form(model)  # asserts equality in float64
    x = subject.random_images(2, 64)
    with torch.inference_mode():
        assert torch.allclose(form(x), model(x), rtol=0, atol=1e-4)


def test_token_form_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    token_form = module("token_form")
    monkeypatch.setattr(token_form.F, "gelu", lambda x: 0.999 * torch.nn.functional.silu(x))
    model = module("subject").random_model(TINY)
    monkeypatch.setattr(torch.nn.GELU, "forward", lambda self, x: x.relu())
    with pytest.raises(AssertionError, match="rewritten model differs"):
        token_form.token_form(model)


def subject(dtype: torch.dtype = torch.float32, batch: int = 1, size: int = 64):
    found = module("subject")
    return found.Subject(found.random_model(TINY, dtype), found.random_images(batch, size, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_compute_the_model(native: None, dtype: torch.dtype) -> None:
    peers = module("peers")
    made = subject(dtype)
    judge = peers.Judge(made)
    for name in peers.names(compiled=False):
        if name in RUNTIMES:
            continue
        peer = peers.build(name, made)
        assert peer.reason is None and peer.detail
        ratios = judge.ratios(name, peers.outputs(peer.run, judge.inputs, peer.layout))
        assert ratios.rms < 2, name  # any peer of another function is orders of magnitude off
    for int8, compiled, rewritten in (
        (False, {"compile", "compile_linear"}, {"eager_linear", "compile_linear"}),
        (True, {"torchao_dynamic", "torchao_static"}, {"torchao_dynamic", "torchao_static"}),
    ):
        names = peers.names(int8=int8)
        assert names[0] == "ours" and set(names) - set(peers.names(compiled=False, int8=int8)) == compiled
        assert set(names) - set(peers.names(rewritten=False, int8=int8)) == rewritten


RUNTIMES = {"openvino_latency": "openvino", "openvino_throughput": "openvino", "onnxruntime": "onnxruntime"}


@pytest.mark.parametrize("name", RUNTIMES)
def test_runtimes_compute_the_model(name: str) -> None:
    pytest.importorskip(RUNTIMES[name], reason=f"{RUNTIMES[name]} is not installed (the peers extra)")
    peers = module("peers")
    made = subject(batch=2)
    peer = peers.build(name, made)
    assert peer.reason is None and peer.form == "unchanged"
    judge = peers.Judge(made)
    assert judge.ratios(name, peers.outputs(peer.run, judge.inputs)).rms < 3
    requests = peer.batches // module("peers_runtime").ROUNDS
    if name == "openvino_throughput":
        assert peer.batches >= 2 and f"{requests} requests in flight, time per batch of {peer.batches}" in peer.detail
    else:
        assert peer.batches == 1
    peer.on(made.x)()


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_prepared_call_keeps_its_images(name: str) -> None:
    """OpenVINO's latency request did not: the memory was freed under it."""
    pytest.importorskip(RUNTIMES[name], reason=f"{RUNTIMES[name]} is not installed (the peers extra)")
    peer = module("peers").build(name, subject(batch=2))
    memory = np.zeros((2, 3, 64, 64), dtype=np.float32)
    kept = weakref.ref(memory)
    call = peer.on(torch.from_numpy(memory))
    del memory
    gc.collect()
    assert kept() is not None
    call()


@pytest.mark.parametrize("name", RUNTIMES)
def test_runtime_that_is_not_installed_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, RUNTIMES[name], None)
    peer = module("peers").build(name, subject())
    assert peer.run is None and f"{RUNTIMES[name]} is not installed (pip install" in peer.reason


def test_runtime_without_the_dtype_says_so() -> None:
    peers = module("peers")
    assert "float32 convolutions only" in peers.build("onnxruntime", subject(torch.bfloat16)).reason


def test_openvino_that_computes_in_another_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed (the peers extra)")
    compile_model = openvino.Core.compile_model

    def elsewhere(core: object, model: object, device: str, settings: dict) -> object:
        """As a processor that has float32 only would."""
        return compile_model(core, model, device, {**settings, "INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(openvino.Core, "compile_model", elsewhere)
    peer = module("peers").build("openvino_latency", subject(torch.bfloat16))
    assert peer.run is None and "asked for bf16, OpenVINO computes in f32" in peer.reason


def test_subject_survives_a_file(tmp_path: Path) -> None:
    made = subject(torch.bfloat16)
    made.save(tmp_path / "subject.pt", TINY)
    found = module("subject").Subject.load(tmp_path / "subject.pt")
    assert torch.equal(found.x, made.x) and found.x.dtype == torch.bfloat16 and not found.model.training
    with torch.inference_mode():
        assert torch.equal(found.model(made.x), made.model(made.x))


def test_ours_is_asserted_and_peers_are_reported(native: None) -> None:
    peers = module("peers")
    made = subject(batch=4, size=32)
    judge = peers.Judge(made)
    wrong = peers.outputs(lambda x: made.model(x) * 1.01, judge.inputs)
    assert not judge.ratios("eager", wrong).passed
    with pytest.raises(AssertionError, match="not accurate enough"):
        judge.ratios("ours", wrong)


def test_every_op_has_a_benchmark() -> None:
    assert set(module("op_cases").SHAPES) == {name for name, op in ops.ALL.items() if not op.in_place}
    for name, op in ops.ALL.items():
        assert not op.in_place or name.rstrip("_") in ops.ALL, f"{name} has no twin whose benchmark is its own"


@pytest.mark.parametrize("op", [name for name, op in ops.ALL.items() if not op.in_place])
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
