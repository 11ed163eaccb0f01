"""What ``patch`` does for a backend that compiles, and what float32 on a GPU is measured against."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest
import torch

import riformer_kernels
from riformer_kernels import backends, precision, verification

pytestmark = pytest.mark.usefixtures("one_thread")
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def compiling(monkeypatch):
    """The reference backend as one that compiles."""
    plain = backends.ALL["reference"]
    monkeypatch.setitem(backends.ALL, "reference", dataclasses.replace(plain, compiles=True))


@pytest.mark.parametrize("verify", [False, True])
def test_no_hook_of_the_user_fires(model, compiling, verify, images):
    calls = []
    model.network[0][1].register_forward_hook(lambda *_: calls.append("block"))
    model.network[0][0].mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    model.register_forward_hook(lambda *_: calls.append("model"))
    riformer_kernels.patch(model, backend="reference", strict=False, verify=verify, image_size=64)
    assert calls == []
    with torch.inference_mode():
        model(images)
    assert set(calls) == {"block", "mlp", "model"}


def test_the_time_that_is_said_has_that_of_verification(model, compiling, monkeypatch, capsys):
    verify = verification.verify

    def slow(module):
        time.sleep(0.4)
        return verify(module)

    monkeypatch.setattr(verification, "verify", slow)
    riformer_kernels.patch(model, backend="reference", image_size=64)
    said = capsys.readouterr().err
    found = re.fullmatch(
        r"riformer_kernels: compiling reference kernels for 64 x 64 pixels, float32 \.\.\. "
        r"(\S+) s, (\S+) s of them for verification\n",
        said,
    )
    assert found and float(found[1]) >= float(found[2]) >= 0.4, said


def test_a_failure_ends_the_line(model, compiling, monkeypatch, capsys):
    def fail(module):
        raise RuntimeError("no")

    monkeypatch.setattr(verification, "verify", fail)
    with pytest.raises(RuntimeError, match="no"):
        riformer_kernels.patch(model, backend="reference", image_size=64)
    assert re.search(r"failed after \S+ s\n$", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------ float32 on a GPU


@pytest.fixture
def settings():
    """PyTorch's settings of float32 products and convolutions, at their defaults."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision, conv.fp32_precision = "ieee", "tf32"
    yield matmul, conv
    matmul.fp32_precision, conv.fp32_precision = before


def test_convolutions_are_held_to_what_products_do(settings):
    matmul, conv = settings
    for wanted in ("ieee", "tf32"):
        matmul.fp32_precision = wanted
        with precision.convolutions_like_products(GPU):
            assert conv.fp32_precision == wanted
        assert conv.fp32_precision == "tf32"
    matmul.fp32_precision = "ieee"
    with pytest.raises(ValueError, match="inside"), precision.convolutions_like_products(GPU):
        raise ValueError("inside")
    assert conv.fp32_precision == "tf32"
    with precision.convolutions_like_products(CPU):
        assert conv.fp32_precision == "tf32", "a CPU has no such setting"


def test_verification_takes_exact_convolutions_for_its_yardstick(model, settings, monkeypatch):
    """TF32's error is some thousand times float32's: by its measure no defect of a float32 kernel would show."""
    _, conv = settings
    seen = []
    forward = type(model).forward

    def spy(self, x):
        seen.append(conv.fp32_precision)
        return forward(self, x)

    monkeypatch.setattr(type(model), "forward", spy)
    riformer_kernels.patch(model, backend="reference", verify=False)
    as_on_a_gpu = precision.convolutions_like_products
    monkeypatch.setattr(verification, "convolutions_like_products", lambda device: as_on_a_gpu(GPU))
    assert verification.verify(model).passed
    assert len(seen) >= 2 and set(seen) == {"ieee"} and conv.fp32_precision == "tf32"
