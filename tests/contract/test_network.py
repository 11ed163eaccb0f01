"""A network in one call: the same bits as op by op, fresh parameters, and op by op where somebody watches."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from riformer.model import RIFormer
from riformer.randomize import randomize_
from support_compare import OpCounter
from support_cpu import per_isa
from support_models import TINY
from torch import nn
from torch.profiler import ProfilerActivity, profile

from riformer_kernels import forward, patch
from riformer_kernels.backends import cpu
from riformer_kernels.dtypes import DTYPES, name_of
from riformer_kernels.machine import threads

pytestmark = pytest.mark.skipif(cpu.unusable() is not None, reason=f"no CPU library: {cpu.unusable()}")


def tiny(**options) -> nn.Module:
    return randomize_(RIFormer(TINY, **{"num_classes": 10, "deploy": True, **options}), 0).eval()


def draw(batch: int, height: int = 65, width: int = 49, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((batch, 3, height, width), generator=torch.Generator().manual_seed(1)).to(dtype)


def op_by_op(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> object:
    with monkeypatch.context() as patched:
        patched.setattr(forward, "watched", lambda x: True)
        return function()


def calls_of(function: Callable[[], object]) -> Counter:
    """How often each op of the engine was called, as PyTorch's profiler sees it: it takes no part in the calls."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    names = [event.name for event in found.events() if event.name.startswith("riformer::")]
    return Counter(name.removeprefix("riformer::") for name in names)


def flat(result: object) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def assert_same(found: object, expected: object) -> None:
    assert len(flat(found)) == len(flat(expected))
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5, 16, 17])
@per_isa
def test_the_same_bits_as_op_by_op(isa, batch, count, monkeypatch):
    """Images in groups, passes of several images, shares of threads, and a rest that fits into none of them."""
    model = tiny()
    patch(model, verify=False)
    with torch.inference_mode(), threads(count):
        assert_same(model(draw(batch)), op_by_op(lambda: model(draw(batch)), monkeypatch))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("options", [{}, {"deploy": False}, {"out_indices": (0, 2, 4, 6), "num_classes": 0}], ids=str)
def test_every_kind_of_network(options, norm, dtype, layout, monkeypatch):
    model = tiny(norm=norm, **options)
    patch(model, verify=False, compute_dtype=dtype)
    images = draw(4).contiguous(memory_format=layout)
    with torch.inference_mode(), threads(2):
        found = model(images)
        assert_same(found, op_by_op(lambda: model(images), monkeypatch))
        assert calls_of(lambda: model(images))["network"] == 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(model(images), op_by_op(lambda: model(images), monkeypatch))


def test_images_too_large_for_the_memory_that_is_kept(monkeypatch):
    model = tiny()
    patch(model, verify=False)
    images = draw(1, 2100, 2060)  # 17 MB of tokens behind the stem
    with torch.inference_mode():
        assert_same(model(images), op_by_op(lambda: model(images), monkeypatch))


def test_one_call_of_one_op():
    model = tiny()
    patch(model)
    with torch.inference_mode():
        model(draw(2))
        assert calls_of(lambda: model(draw(2))) == {"network": 1}


def test_part_by_part_where_a_part_is_not_fused():
    model = tiny()
    model.network[0][1].register_forward_hook(lambda *_: None)
    patch(model, verify=False, strict=False)
    with torch.inference_mode():
        calls = calls_of(lambda: model(draw(2)))
    assert calls["network"] == calls["network_prepare"] == 0 and calls["block_"] == 7


def test_features_of_a_downsampling(monkeypatch):
    """No RIFormer returns them, but the settings allow it: then the network runs part by part."""
    model = tiny(out_indices=(1, 6), num_classes=0)
    patch(model, verify=False)
    with torch.inference_mode():
        calls = calls_of(lambda: model(draw(2)))
    assert calls["network"] == 0 and calls["block_"] == 8 and calls["norm"] == 2


def test_a_dispatch_mode_sees_every_op():
    model = tiny()
    patch(model, verify=False)
    with torch.inference_mode():
        model(draw(2))
        with OpCounter() as counter:
            model(draw(2))
    assert counter.calls["block_"] == 8 and counter.calls["network"] == 0


class Watching(torch.Tensor):
    pass


def test_a_tensor_subclass_sees_every_op():
    model = tiny()
    patch(model, verify=False)
    with torch.inference_mode():
        calls = calls_of(lambda: model(draw(2).as_subclass(Watching)))
    assert calls["network"] == 0 and calls["block_"] == 8


def written(model: nn.Module) -> None:
    model.network[0][0].mlp.fc1.weight.data.mul_(-1)


def other_memory(model: nn.Module) -> None:
    weight = model.network[0][0].mlp.fc1.weight
    weight.data = -weight.data.clone()


def other_dtype(model: nn.Module) -> None:
    weight = model.network[0][0].mlp.fc1.weight
    weight.data = -weight.data.to(torch.bfloat16)


def other_parameter(model: nn.Module) -> None:
    model.network[0][0].mlp.fc1.weight = nn.Parameter(-model.network[0][0].mlp.fc1.weight.detach())


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: -value for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [written, other_memory, other_dtype, other_parameter, assigned])
def test_parameters_are_never_stale(change, monkeypatch):
    model = tiny()
    patch(model, verify=False)
    with torch.no_grad():
        before = model(draw(2))
        change(model)
        after = model(draw(2))
        assert not torch.equal(before, after)
        assert_same(after, op_by_op(lambda: model(draw(2)), monkeypatch))


def test_functional_call(monkeypatch):
    model = tiny()
    patch(model, verify=False)
    parameters = {name: value.detach() * -1 for name, value in model.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(model, parameters, (draw(2),))
        expected = op_by_op(lambda: torch.func.functional_call(model, parameters, (draw(2),)), monkeypatch)
        assert_same(found, expected)
        assert not torch.equal(found, model(draw(2)))


def test_a_weight_of_another_shape_is_refused_as_the_op_refuses_it():
    model = tiny()
    patch(model, verify=False)
    with torch.inference_mode():
        model(draw(1))
        weight = model.network[0][0].mlp.fc2.weight
        weight.data = weight.data[:, :-8].clone()
        with pytest.raises(RuntimeError, match=r"fc2_weight has shape \[16, 56, 1, 1\], expected \[16, 64\]"):
            model(draw(1))


def test_what_was_prepared_is_released_with_its_program():
    model = tiny()
    patch(model, verify=False)
    with torch.inference_mode():
        model(draw(1))
        state = next(value for value in vars(model).values() if hasattr(value, "program_for"))
        run = state.program_for(model).network._prepared.run
        assert len(run(draw(1), torch.float32, torch.float32, torch.float32)) == 1
        del state, model
        gc.collect()
        with pytest.raises(RuntimeError, match="there is no prepared network"):
            run(draw(1), torch.float32, torch.float32, torch.float32)


def test_threads_of_python_share_a_network():
    model = tiny()
    patch(model, verify=False)
    images = [draw(1 + i % 3, 40 + 8 * i) for i in range(6)]
    with torch.inference_mode():
        expected = [model(x) for x in images]
    found: list[list[torch.Tensor]] = []

    def work() -> None:
        with torch.inference_mode():
            found.append([model(x) for x in images * 3])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for results in found:
        assert all(torch.equal(one, other) for one, other in zip(results, expected * 3, strict=True))


@pytest.mark.parametrize(
    ("kinds", "tensors", "integers", "match"),
    [
        ([7], [], [], "no part of kind 7"),
        ([0], [None], [4, 2], "lacks arguments"),
        ([], [None], [], "more arguments than the parts take"),
    ],
)
def test_a_wrong_description_is_refused(kinds, tensors, integers, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.riformer.network_prepare(kinds, tensors, integers, [])


def test_a_network_begins_with_an_embedding():
    number = torch.ops.riformer.network_prepare([2], [torch.ones(8), torch.ones(8)], [0], [1e-5])
    with pytest.raises(RuntimeError, match="its first part is no embedding"):
        torch.ops.riformer.network(number, draw(1), torch.float32, torch.float32, torch.float32)
    torch.ops.riformer.network_release(number)
