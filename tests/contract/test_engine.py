"""``Engine`` on the CPU: padding, splitting, threads, bad input. With CUDA graphs: `test_engine_graphs.py`, and
`test_gpu.py` on a GPU."""

from __future__ import annotations

import threading
from typing import ClassVar

import pytest
import torch

import riformer_kernels
from riformer_kernels import Engine, InputError, MemoryLimitError

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 33


def batch(count: int, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def patched(model, backend):
    riformer_kernels.patch(model, backend=backend, verify=False)
    return model


@pytest.fixture
def calls(patched, monkeypatch):
    """The batch of every call of the model."""
    seen = []
    forward = type(patched).forward
    monkeypatch.setattr(type(patched), "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    return seen


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 13])
def test_any_batch_gives_the_bits_of_a_direct_call(patched, calls, count):
    found = Engine(patched, (4, 1, 2), SIZE)
    x = batch(count)
    with torch.inference_mode():
        expected = patched(x)
    calls.clear()
    out = found(x)
    assert torch.equal(out, expected) and out.shape == (count, 10)
    assert calls == [4] * (count // 4) + ([{1: 1, 2: 2, 3: 4}[count % 4]] if count % 4 else [])


def test_what_padding_holds_does_not_matter(patched):
    found = Engine(patched, (4,), SIZE)
    x = batch(2)
    before = found(x)
    found(torch.full((4, 3, SIZE, SIZE), float("nan")))
    assert torch.equal(found(x), before)


def test_a_result_is_the_callers_own(patched):
    found = Engine(patched, (1, 2), SIZE)
    first = found(batch(2))
    kept = first.clone()
    found(batch(2, seed=1))
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(found(batch(2)), kept)
    assert found(batch(1)).untyped_storage().nbytes() == 10 * 4, "a view would keep the padding alive"


def test_a_batch_of_none(patched):
    assert Engine(patched, (2,), SIZE)(batch(0)).shape == (0, 10)


def test_a_backbone_returns_its_features(make, backend):
    model = make(out_indices=(2, 6))
    riformer_kernels.patch(model, backend=backend, verify=False)
    found = Engine(model, (2,), SIZE)
    with torch.inference_mode():
        expected = model(batch(5))
    out = found(batch(5))
    assert isinstance(out, tuple) and all(torch.equal(mine, theirs) for mine, theirs in zip(out, expected, strict=True))


def test_other_dtypes_and_layouts_are_converted(make, backend):
    model = make(num_classes=10, dtype=torch.bfloat16)
    riformer_kernels.patch(model, backend=backend, verify=False)
    found, x = Engine(model, (2,), (SIZE, 17)), torch.randn(2, 3, SIZE, 17)
    expected = found(x.bfloat16())
    assert expected.dtype == torch.bfloat16 and torch.equal(found(x), expected)
    assert torch.equal(found(x.contiguous(memory_format=torch.channels_last)), expected)


def test_an_unpatched_model_is_patched(model, backend):
    if backend != "cpu":
        pytest.skip("auto chooses the native backend")
    assert not isinstance(model, riformer_kernels.fused.FusedBackbone)
    with torch.inference_mode():
        expected = model(batch(2))
    found = Engine(model, (2,), SIZE)
    assert isinstance(model, riformer_kernels.fused.FusedBackbone)
    assert torch.allclose(found(batch(2)), expected, atol=1e-4)


def test_new_weights_count(patched):
    found = Engine(patched, (2,), SIZE)
    before = found(batch(2))
    patched.head.fc.bias.data.add_(1)
    assert torch.allclose(found(batch(2)), before + 1, atol=1e-5)
    patched.head.fc.bias = torch.nn.Parameter(patched.head.fc.bias.detach() + 1)
    assert torch.allclose(found(batch(2)), before + 2, atol=1e-5)


def test_built_in_inference_mode_and_called_outside(patched):
    with torch.inference_mode():
        found = Engine(patched, (2,), SIZE)
        expected = found(batch(2))
    assert torch.equal(found(batch(2)), expected)


def test_images_that_want_gradients(patched):
    found = Engine(patched, (2,), SIZE)
    assert torch.equal(found(batch(2).requires_grad_()), found(batch(2)))
    assert not found.__dict__["_slots"][2, None].images.requires_grad


class Elsewhere(torch.Tensor):
    """A result that lies on another device than the images."""

    moved: ClassVar[list] = []

    def to(self, *arguments, **options):
        self.moved.append(arguments)
        return torch.zeros(self.shape)


def test_a_batch_of_none_comes_back_to_where_the_images_are(patched, monkeypatch):
    found = Engine(patched, (2,), SIZE)
    monkeypatch.setattr(type(patched), "forward", lambda self, x: torch.zeros(len(x), 10).as_subclass(Elsewhere))
    out = found(batch(0))
    assert type(out) is torch.Tensor and out.shape == (0, 10) and Elsewhere.moved[-1] == (torch.device("cpu"),)


def test_threads_take_turns(patched):
    found = Engine(patched, (1, 2, 4), SIZE)
    inputs = [batch(1 + index % 5, seed=index) for index in range(12)]
    with torch.inference_mode():
        expected = [patched(x) for x in inputs]
    wrong: list[int] = []

    def work(start: int) -> None:
        for _ in range(3):
            indices = range(start, len(inputs), 3)
            wrong.extend(index for index in indices if not torch.equal(found(inputs[index]), expected[index]))

    workers = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong and not any(worker.is_alive() for worker in workers)


BAD = [
    ("a path", "found str"),
    (torch.zeros(3, SIZE, SIZE), "unsqueeze"),
    (torch.zeros(1, 4, SIZE, SIZE), r"found shape \(1, 4"),
    (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), "found torch.uint8"),
    (
        torch.zeros(1, 3, 64, SIZE),
        r"64 x 33 pixels are larger than what this engine was built for.*image_size=\(64, 33\)",
    ),
    (torch.zeros(1, 3, 32, 32), "32 x 32 pixels are not what this engine was built for"),
    (torch.zeros(1, 3, SIZE, SIZE, device="meta"), "on cpu or the CPU, found them on meta"),
]


@pytest.mark.parametrize(("images", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "images")
def test_bad_images(patched, images, message):
    found = Engine(patched, (2,), SIZE)
    expected = found(batch(2))
    with pytest.raises(InputError, match=message):
        found(images)
    assert torch.equal(found(batch(2)), expected), "usable afterwards"


@pytest.mark.parametrize("sizes", [(), (0,), (-1, 2), (1.5,), 8, ("8",)], ids=str)
def test_bad_batch_sizes(patched, sizes):
    with pytest.raises(InputError, match="batch_sizes must be positive integers"):
        Engine(patched, sizes, SIZE)


@pytest.mark.parametrize("size", [0, -5, (33,), (33, 0), "224", None], ids=str)
def test_bad_image_sizes(patched, size):
    with pytest.raises(InputError, match="image_size must be"):
        Engine(patched, (1,), size)


def test_an_image_too_small_for_the_network(patched):
    with pytest.raises(InputError, match="large enough"):
        Engine(patched, (1,), 1)(torch.zeros(1, 3, 1, 1))


def test_a_model_that_changed_dtype_or_was_restored(patched):
    found = Engine(patched, (2,), SIZE)
    expected = found(batch(2))
    patched.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"bfloat16 on cpu now, and this engine was built for torch.float32"):
        found(batch(2))
    patched.to(torch.float32)
    assert found(batch(2)).shape == expected.shape
    riformer_kernels.unpatch(patched)
    with pytest.raises(InputError, match="restored since"):
        found(batch(2))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError], ids=lambda kind: kind.__name__)
def test_out_of_memory_says_how_much_and_leaves_the_engine_usable(patched, monkeypatch, error):
    found = Engine(patched, (2, 4), SIZE)
    expected = found(batch(3))

    def fail(self, x):
        raise error("can't allocate memory: you tried to allocate 123456789 bytes")

    with monkeypatch.context() as patcher:
        patcher.setattr(type(patched), "forward", fail)
        with pytest.raises(MemoryLimitError, match=r"batch 4, 33 x 33 pixels, torch.float32.*123456789 bytes.*split"):
            found(batch(3))
    assert torch.equal(found(batch(3)), expected)


def test_other_errors_pass_through(patched, monkeypatch):
    found = Engine(patched, (2,), SIZE)

    def fail(self, x):
        raise RuntimeError("something else")

    monkeypatch.setattr(type(patched), "forward", fail)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        found(batch(1))


def test_it_prints_what_it_is(patched):
    assert repr(Engine(patched, (8, 1), (33, 17))) == "Engine(batch_sizes=(1, 8), image_size=33x17, torch.float32, cpu)"
