"""Dtypes, autocast, layouts, bad input, and the bits: determinism, batch invariance, NaN."""

from __future__ import annotations

import pytest
import torch
from support_compare import close, outputs

from riformer_kernels import InputError, numerics, patch


def test_the_callers_images_are_not_written_to(model, images, backend):
    before = images.clone()
    patch(model, backend=backend)
    with torch.inference_mode():
        model(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [0, 100])
def test_compute_dtype(make, images, backend, inner, classes):
    model = make(num_classes=classes)
    with torch.inference_mode():
        expected = model(images)
        patch(model, backend=backend, compute_dtype=inner)
        found = model(images)
    for mine, theirs in zip(outputs(found), outputs(expected), strict=True):
        assert mine.dtype == torch.float32
        error = (mine - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert 1e-5 < error < 3e-2, "computed in the narrower dtype, and not wrong"


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [0, 100])
@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("plain", [False, True], ids=["", "reference"])
def test_autocast_returns_what_the_original_returns(make, backend, count_ops, parameters, given, classes, norm, plain):
    backend = "reference" if plain else backend  # PyTorch's own convolutions would follow autocast, native ops do not
    model = make(num_classes=classes, norm=norm, dtype=parameters)
    images = torch.randn((4, 3, 96, 96), generator=torch.Generator().manual_seed(0)).to(given)
    with torch.no_grad():
        golden = make(num_classes=classes, norm=norm, dtype=parameters).double()(images.double())
        with torch.autocast("cpu", torch.bfloat16):
            eager = model(images)
        patch(model, backend=backend)
        found = []
        with torch.autocast("cpu", torch.bfloat16):
            calls = count_ops(lambda: found.append(model(images)))
            assert torch.is_autocast_enabled("cpu")
    assert plain or calls["block_"] == 8
    for mine, theirs, truth in zip(outputs(found[0]), outputs(eager), outputs(golden), strict=True):
        assert mine.dtype == theirs.dtype
        assert numerics.compare(mine, theirs, truth, dtype=torch.bfloat16).passed


def test_autocast_with_an_unfused_block(make, images, backend):
    model = make(num_classes=100)
    model.network[2][0].mlp.register_forward_hook(lambda *args: None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        patch(model, backend=backend, strict=False)
        found = model(images)
    assert found.dtype == expected.dtype and close(found.float(), expected.float(), 3e-2)


def test_disabled_autocast_changes_nothing(model, images, backend):
    patch(model, backend=backend)
    with torch.inference_mode():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            assert torch.equal(model(images), expected)


BAD = [
    (lambda x: x[0], r"3 dimensions.*unsqueeze\(0\)"),
    (lambda x: x[:, :2], "found 2 channels"),
    (lambda x: x.permute(0, 2, 3, 1), r"permute\(0, 3, 1, 2\)"),
    (lambda x: (x * 255).to(torch.uint8), "found torch.uint8; convert and normalise"),
    (lambda x: x.bfloat16(), r"torch.bfloat16; use images.to\(torch.float32\)"),
    (lambda x: x.double(), "torch.float64"),
    (lambda x: x.to("meta"), r"images on meta; use images.to\('cpu'\)"),
    (lambda x: x.numpy(), "found ndarray"),
    (lambda x: x[:, :, :2], r"7x7 window, found H, W = 2, 49"),
    (lambda x: x[:, :, :0], r"found H, W = 0, 49"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named_and_the_model_stays_usable(model, images, backend, change, message):
    with torch.inference_mode():
        patch(model, backend=backend)
        expected = model(images)
        with pytest.raises(InputError, match=message):
            model(change(images))
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_batch_zero(make, images, backend, classes, norm):
    model = make(num_classes=classes, norm=norm, out_indices=(0, 6))
    patch(model, backend=backend)
    with torch.inference_mode():
        full, empty = outputs(model(images)), outputs(model(images[:0]))
    assert [value.shape for value in empty] == [(0, *value.shape[1:]) for value in full]


@pytest.mark.parametrize("size", [(3, 3), (4, 9), (32, 32), (31, 65), (225, 193)])
def test_sizes_down_to_one_position(make, backend, size):
    model = make(num_classes=10)
    images = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(images)
        patch(model, backend=backend)
        assert close(model(images), expected, 1e-4)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_input_channels(make, backend, channels):
    model = make(in_channels=channels)
    images = torch.randn((2, channels, 40, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(images)
        patch(model, backend=backend)
        assert close(model(images), expected)


def test_images_that_are_strided_views(model, images, backend):
    wide = images.repeat_interleave(2, dim=3)[:, :, :, ::2]
    patch(model, backend=backend)
    with torch.inference_mode():
        assert not wide.is_contiguous() and torch.equal(model(wide), model(images))
        expanded = images[:1].expand(3, -1, -1, -1)
        assert torch.equal(model(expanded), model(expanded.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_same_bits_every_run_and_in_every_batch(make, backend, dtype, norm):
    if backend == "reference":
        pytest.skip("plain PyTorch promises neither: its reductions depend on the batch")
    model = make(num_classes=10, norm=norm, dtype=dtype)
    patch(model, backend=backend)
    images = torch.randn((7, 3, 65, 97), generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        together = model(images)
        for _ in range(3):
            assert torch.equal(model(images), together)
        alone = torch.cat([model(image[None]) for image in images])
        assert torch.equal(alone, together)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert torch.equal(model(images), together), "the number of threads changes nothing"
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_image(make, images, backend, norm, value):
    model = make(num_classes=10, norm=norm)
    patch(model, backend=backend)
    images = torch.cat((images, images[:1]))
    with torch.inference_mode():
        clean = model(images)
        images[1, 0, 5, 5] = value
        found = model(images)
    assert torch.equal(found[0], clean[0]) and torch.equal(found[2], clean[2])
    assert found[1].isnan().all()
