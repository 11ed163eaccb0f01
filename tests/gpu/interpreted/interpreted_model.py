"""Whole models on the interpreted Triton kernels: patched as on a GPU, with CPU tensors in the place of CUDA's."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from riformer.model import RIFormer
from riformer.randomize import randomize_
from support_cases import check_ratios
from support_interpreted import Guarded

import riformer_kernels
from riformer_kernels import Engine, VerificationError, backends, ops, verification
from riformer_kernels.backends import triton as backend
from riformer_kernels.backends.triton import block, block_maps, choice, moments

TINY = {"layers": [1, 1, 2, 1], "embed_dims": [16, 24, 40, 200]}
NAME = "interpreted"
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The Triton backend with the launchers in place of the dispatcher's ops, for CPU tensors."""
    launchers = {name: backend.launcher(name) for name in ops.ALL}
    made = dataclasses.replace(
        backend.BACKEND, name=NAME, automatic=False, devices=("cpu",), unusable=lambda: None, refuses=None,
        detail=lambda: "interpreter", ops=launchers,
    )  # fmt: skip
    monkeypatch.setitem(backends.ALL, NAME, made)


def tiny(dtype: torch.dtype = torch.float32, **options: object) -> RIFormer:
    return randomize_(RIFormer(TINY, **options), 0).to(dtype).eval()


@pytest.mark.parametrize(
    ("dtype", "deploy", "layout", "size"),
    [
        (torch.float32, False, "nchw", (49, 33)),
        (torch.float16, True, "channels_last", (65, 64)),
        (torch.float32, True, "channels_last", (32, 32)),
    ],
    ids=str,
)
def test_model(dtype, deploy, layout, size):
    model = tiny(dtype, deploy=deploy, num_classes=300).to(memory_format=FORMATS[layout])
    images = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(1)).to(dtype)
    images = images.contiguous(memory_format=FORMATS[layout])
    with torch.inference_mode():
        eager, golden = model(images), copy.deepcopy(model).double()(images.double())
        riformer_kernels.patch(model, backend=NAME, verify=False, image_size=16)
        check_ratios(model(images), eager, golden, f"{dtype} {layout} {size}")


def test_patch_compiles_with_a_line_and_verifies(capsys):
    model = tiny(num_classes=300)
    handle = riformer_kernels.patch(model, backend=NAME, image_size=(33, 40))
    line = capsys.readouterr().err
    assert line.startswith("riformer_kernels: compiling interpreted kernels for 33 x 40 pixels, float32 ...")
    assert all(row.reason is None for row in handle.report) and handle.verification[""].passed
    assert "interpreted (interpreter)" in str(handle)


def test_a_bad_image_size_leaves_the_model_as_it_was():
    model = tiny()
    for size in (0, "224", (1, 2, 3), (224, 0.5)):
        with pytest.raises(riformer_kernels.InputError, match="image_size"):
            riformer_kernels.patch(model, backend=NAME, image_size=size)
        assert type(model) is RIFormer


def test_verification_catches_a_broken_kernel(monkeypatch):
    original = block_maps.launch

    def launch(kernel, programs, device, *arguments, **settings):
        if kernel.__name__ == "_prepare_kernel":
            arguments = (*arguments[:-1], 0.1)  # eps2
        original(kernel, programs, device, *arguments, **settings)

    monkeypatch.setattr(block_maps, "launch", launch)
    monkeypatch.setattr(verification, "MORE_BATCHES", 0)
    with pytest.raises(VerificationError):
        riformer_kernels.patch(tiny(), backend=NAME, image_size=32)


def test_layouts_and_batches_give_the_same_bits():
    model = tiny(num_classes=10)
    riformer_kernels.patch(model, backend=NAME, verify=False, image_size=16)
    x = torch.randn(3, 3, 17, 24)
    with torch.inference_mode():
        out = model(x)
        assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), out)
        assert all(torch.equal(model(x[i : i + 1])[0], out[i]) for i in range(3))
        assert model(x[:0]).shape == (0, 10)
    assert torch.equal(Engine(model, (2,), (17, 24))(x), out)


def test_features_stay_inside_their_tensors():
    model = tiny(out_indices=(0, 2, 4, 6))
    riformer_kernels.patch(model, backend=NAME, verify=False, image_size=16)
    x = torch.randn(1, 3, 17, 24)
    with torch.inference_mode():
        expected = model(x)
        with Guarded() as mode:
            found = model(x)
        mode.check()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


# ----------------------------------------------------------------------------------------------------------- overflow


class _LastImage:
    """Launches that run the programs of the last image alone: all others' memory is never touched, so it need not be
    there. `torch.empty` of gigabytes takes address space, no memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        offset = [0]
        for name in ("set_grid_idx", "set_grid_dim"):
            original = getattr(builder, name)
            monkeypatch.setattr(builder, name, lambda x, y, z, original=original: original(x + offset[0], y, z))
        original = block.launch

        def launch(kernel, programs, device, *arguments, **settings):
            assert programs % batch == 0
            own = programs // batch
            offset[0] = programs - own
            original(kernel, own, device, *arguments, **settings)
            offset[0] = 0

        for module in (block, block_maps, moments):
            monkeypatch.setattr(module, "launch", launch)


def overflowing(monkeypatch, batch, channels, hidden, side, chosen):
    """The last of ``batch`` images against the same image alone, bit for bit."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).half()

    vectors = [draw(channels) for _ in range(5)]
    parameters = (
        *vectors[:3], None, None, 1e-5, *vectors[3:], 1e-5, draw(hidden, channels) / channels**0.5, draw(hidden),
        draw(channels, hidden) / hidden**0.5, draw(channels), draw(channels), False, True,
    )  # fmt: skip
    monkeypatch.setattr(choice, "choose_block", lambda problem: chosen)
    image = draw(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    alone, alone_moments = block.block(image, moments.moments(image), *parameters)
    x = torch.empty((batch, channels, side, side), dtype=torch.float16, memory_format=torch.channels_last)
    x[-1:].copy_(image)
    statistics = torch.empty((batch, 2, channels))
    statistics[-1:] = moments.moments(image)
    _LastImage(monkeypatch, batch)
    out, out_moments = block.block(x, statistics, *parameters)
    assert torch.equal(out[-1:], alone) and torch.equal(out_moments[-1:], alone_moments)


def test_tokens_beyond_2_31_elements(monkeypatch):
    batch, channels, side = 2**31 // (16 * 64 * 64) + 2, 16, 64
    assert batch * channels * side * side > 2**31
    chosen = choice.BlockChoice(choice.FusedTile(64, 16, 16, 4, 1))
    overflowing(monkeypatch, batch, channels, 16, side, chosen)


def test_hidden_beyond_2_31_elements(monkeypatch):
    batch, hidden, side = 2**31 // (512 * 32 * 32) + 2, 512, 32
    tile = choice.MatrixTile(64, 64, 32, 4, 2)
    assert batch * hidden * side * side > 2**31 > batch * 16 * side * side
    overflowing(monkeypatch, batch, 16, hidden, side, choice.BlockChoice(None, tile, tile))


def test_moments_and_images_beyond_2_31_elements(monkeypatch):
    from riformer_kernels.backends.triton import embed

    batch, side = 2**31 // (16 * 64 * 64) + 2, 64
    image = torch.randn(1, 16, side, side).half().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3).half()
    expected, expected_moments = embed.embed(image, weight, None, 1, 1, torch.float16, True)
    moments_alone = moments.moments(expected)
    x = torch.empty((batch, 16, side, side), dtype=torch.float16, memory_format=torch.channels_last)
    x[-1:].copy_(image)
    weight = weight.contiguous(memory_format=torch.channels_last)  # else its reordering is a launch without images
    _LastImage(monkeypatch, batch)
    monkeypatch.setattr(embed, "launch", moments.launch)
    out, out_moments = embed.embed(x, weight, None, 1, 1, torch.float16, True)
    assert torch.equal(out[-1:], expected) and torch.equal(out_moments[-1:], expected_moments)
    assert torch.equal(moments.moments(out)[-1:], moments_alone)


@pytest.mark.parametrize("kernel", ["fused", "project", "none"])
def test_the_probe_sees_offsets_of_32_bits(monkeypatch, tmp_path, kernel):
    """The same with the 64-bit conversion of one kernel taken out: it must not survive. In a process of its own, as
    what it reads may not be there."""
    package, engine = "riformer_kernels.backends.triton", "riformer_kernels"
    text = Path(block.__file__).read_text()
    for relative, absolute in (("from ...", f"{engine}."), ("from . ", f"{package} "), ("from .", f"{package}.")):
        text = text.replace(relative, f"from {absolute}")
    start = text.index(f"def _{kernel}_kernel(") if kernel != "none" else len(text)
    text = text[:start] + text[start:].replace("image.to(tl.int64) * positions", "image * positions", 1)
    path = tmp_path / "changed_block.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("changed_block", path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    monkeypatch.setitem(globals(), "block", changed)
    probe = test_hidden_beyond_2_31_elements if kernel == "project" else test_tokens_beyond_2_31_elements
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            try:
                probe(monkeypatch)
            except BaseException:
                os._exit(1)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert (status == 0) == (kernel == "none"), status
