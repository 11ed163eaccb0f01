"""``Engine`` with CUDA graphs, on the stand-in for ``torch.cuda``: what is replayed, captured anew, and left behind.

A replay of the stand-in repeats the ops on the memory that was captured, so a graph that is out of date gives the
results of the model as it was.
"""

from __future__ import annotations

import threading

import pytest
import torch
from support_stand_in import Log, stand_in
from torch import nn

import riformer_kernels
from riformer_kernels import Engine, InputError, MemoryLimitError

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 33


def batch(count: int, seed: int = 0, on_gpu: bool = False) -> torch.Tensor:
    """Images "from the CPU", or with ``on_gpu`` such as the stand-in takes for images on the GPU."""
    images = torch.randn((count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last) if on_gpu else images


@pytest.fixture
def log():
    with stand_in() as log:
        yield log


class Whole(nn.Module):
    """A backbone, and a head of the user's own that is no part of it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.LayerNorm(64)
        self.scale = 2.0
        self.offset = torch.zeros(())
        self.options = {"shift": 0.0}
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        features = self.backbone(x)[-1].mean((2, 3))
        return self.norm(features) * self.scale + self.offset + self.options["shift"]


@pytest.fixture
def model(make) -> nn.Module:
    """Parts outside of the patched backbone."""
    whole = Whole(make()).eval()
    riformer_kernels.patch(whole, backend="reference", verify=False)
    return whole


def direct(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The reference backend's bits depend on the batch, and so on the padding."""
    return torch.allclose(found, expected, atol=1e-4)


def captures(log: Log) -> int:
    return log.count("capture_begin")


# ---------------------------------------------------------------------------------------------------------- replaying


@pytest.mark.parametrize("on_gpu", [False, True], ids=["from-the-cpu", "on-the-gpu"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_a_replay_computes_what_a_call_does(model, log, count, on_gpu):
    engine = Engine(model, (1, 4), SIZE)
    assert captures(log) == 2
    for seed in range(3):
        x = batch(count, seed, on_gpu)
        assert close(engine(x), direct(model, x))
    assert captures(log) == 2 and log.count("replay") == 3 * (1 + (count > 4))


def test_a_batch_of_none_is_not_replayed(model, log):
    engine = Engine(model, (2,), SIZE)
    assert engine(batch(0)).shape == (0, 64) and log.count("replay") == 0


def test_a_result_is_the_callers_own(model, log):
    engine = Engine(model, (2,), SIZE)
    first = engine(batch(2))
    kept = first.clone()
    engine(batch(2, seed=1))
    assert torch.equal(first, kept)


def test_several_results(make, log):
    backbone = make(out_indices=(2, 6))
    riformer_kernels.patch(backbone, backend="reference", verify=False)
    engine = Engine(backbone, (2,), SIZE)
    for count in (1, 2, 3):
        found, expected = engine(batch(count)), direct(backbone, batch(count))
        assert isinstance(found, tuple) and all(map(close, found, expected))


def test_built_in_inference_mode_and_called_outside(model, log):
    with torch.inference_mode():
        engine = Engine(model, (2,), SIZE)
        expected = engine(batch(2))
    assert close(engine(batch(2)[:1]), expected[:1])
    model.scale = 3.0
    with torch.inference_mode():
        expected = engine(batch(2))  # captured anew in inference mode
    assert torch.equal(engine(batch(2)), expected) and torch.equal(expected, direct(model, batch(2)))


# ------------------------------------------------------------------------------------------------------ captured anew


def _hook(model):
    model.norm.register_forward_hook(lambda module, args, out: out + 1)


def _hook_in_the_dictionary(model):
    model.norm._forward_hooks[7] = lambda module, args, out: out + 1


def _hook_within(model):
    model.backbone.network[0][1].mlp.register_forward_hook(lambda module, args, out: out + 1)


def _parameter(model):
    model.norm.bias = nn.Parameter(torch.ones(64))


def _data(model):
    model.norm.bias.data = torch.ones(64)


def _data_within(model):
    model.backbone.network[0][0].mlp.fc2.bias.data = torch.ones(16)


def _module(model):
    model.norm = nn.Identity()


CHANGES = {
    "a hook outside": _hook,
    "a hook put into the dictionary": _hook_in_the_dictionary,
    "a hook within": _hook_within,
    "eps outside": lambda model: setattr(model.norm, "eps", 0.5),
    "eps within": lambda model: setattr(model.backbone.network[0][0].norm2, "eps", 0.5),
    "an attribute": lambda model: setattr(model, "scale", 3.0),
    "an item of an attribute": lambda model: model.options.update(shift=1.0),
    "a tensor attribute": lambda model: setattr(model, "offset", torch.ones(())),
    "a parameter": _parameter,
    "a parameter's data": _data,
    "data within": _data_within,
    "a module": _module,
    "a class": lambda model: setattr(model.norm, "__class__", nn.Identity),
    "a forward": lambda model: setattr(model.norm, "forward", lambda x: x + 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:.*no longer fused")
def test_no_change_leaves_a_stale_graph(model, log, change):
    engine, x = Engine(model, (1, 2), SIZE), batch(2)
    before = engine(x)
    made = captures(log)
    change(model)
    expected = direct(model, x)
    assert not torch.equal(expected, before), "a change that changes nothing tests nothing"
    assert torch.equal(engine(x), expected) and captures(log) == made + 1
    assert torch.equal(engine(x), expected) and captures(log) == made + 1, "captured once, not in every call"
    assert torch.equal(engine(x[:1]), direct(model, x[:1])), "the other batch size as well"


def test_a_graph_captured_in_the_middle_of_a_batch_is_not_mixed_with_older_ones(model, log):
    """The first part of this batch replays a graph from before the change; the second finds none and captures one."""
    engine, x = Engine(model, (1, 4), SIZE), batch(5)
    del engine._slots[1, None]
    model.scale = 3.0
    assert close(engine(x), direct(model, x))


def test_a_model_that_was_moved_is_not_captured(model, log):
    engine = Engine(model, (1, 4), SIZE)
    engine._slots.clear()
    model.to(torch.bfloat16)
    made = captures(log)
    with pytest.raises(InputError, match="this engine was built for"):
        engine(batch(1))
    assert captures(log) == made


def test_a_change_in_place_needs_no_new_graph(model, log):
    engine, x = Engine(model, (2,), SIZE), batch(2)
    before = engine(x)
    model.norm.bias.data.add_(1)
    model.backbone.network[0][0].mlp.fc2.bias.data.add_(1)
    assert torch.equal(engine(x), direct(model, x)) and not torch.equal(engine(x), before)
    assert captures(log) == 1


def test_what_the_model_changes_by_itself_is_no_reason(model, log):
    """The model counts its calls. A direct call counts on, and the graph still holds."""
    engine = Engine(model, (2,), SIZE)
    direct(model, batch(2))
    assert torch.equal(engine(batch(2)), direct(model, batch(2))) and captures(log) == 1


def test_a_hook_elsewhere_is_no_reason(model, log):
    engine = Engine(model, (2,), SIZE)
    nn.Linear(2, 2).register_forward_hook(lambda *_: None)
    engine(batch(2))
    assert captures(log) == 1


def test_autocast_is_captured(model, log):
    engine, x = Engine(model, (2,), SIZE), batch(2)
    plain = engine(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = direct(model, x)
        found = engine(x)
        assert torch.equal(engine(x), found) and captures(log) == 2
    assert torch.equal(found, expected) and not torch.equal(found, plain)
    assert torch.equal(engine(x), plain) and captures(log) == 2


def test_old_memory_stays_until_the_change_is_seen(model, log):
    """A replay that comes before the comparison reads the memory that was captured."""
    engine = Engine(model, (2,), SIZE)
    address = model.norm.bias.data_ptr()
    model.norm.bias.data = torch.ones(64)
    held = [tensor.data_ptr() for tensor in engine._state._memory]
    assert address in held
    engine(batch(2))
    assert address not in [tensor.data_ptr() for tensor in engine._state._memory]


def test_a_moved_or_restored_model(model, log):
    engine = Engine(model, (2,), SIZE)
    expected = engine(batch(2))
    model.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"bfloat16 on cpu now, and this engine was built for torch.float32"):
        engine(batch(2))
    model.to(torch.float32)
    assert engine(batch(2)).shape == expected.shape
    riformer_kernels.unpatch(model)
    with pytest.raises(InputError, match="restored since"):
        engine(batch(2))


# ------------------------------------------------------------------------------------------------- streams and errors


def test_a_capture_lets_other_threads_go_on(model, log):
    Engine(model, (2,), SIZE)
    assert [mode for what, mode in log.events if what == "capture_begin"] == ["thread_local"]


@pytest.mark.parametrize("where", ["capture_begin", "capture_end"])
def test_an_error_in_a_capture_leaves_the_callers_stream(model, log, where):
    mine = torch.cuda.Stream()
    with torch.cuda.stream(mine):
        log.failures[where] = RuntimeError("no capture")
        with pytest.raises(RuntimeError, match=r"^no capture$"):
            Engine(model, (2,), SIZE)
        assert torch.cuda.current_stream() is mine
        engine = Engine(model, (2,), SIZE)
        model.scale = 3.0
        log.failures[where] = RuntimeError("no capture")
        with pytest.raises(RuntimeError, match=r"^no capture$"):
            engine(batch(2))
        assert torch.cuda.current_stream() is mine
        assert torch.equal(engine(batch(2)), direct(model, batch(2))), "usable afterwards"


def test_the_models_error_is_the_one_that_is_raised(model, log, monkeypatch):
    calls = []

    def fail(self, x):
        calls.append(x)
        if len(calls) == 3:  # after the warm-up
            log.failures["capture_end"] = RuntimeError("the capture is invalid")
            raise ValueError("the model's own error")
        return x

    monkeypatch.setattr(Whole, "forward", fail)
    with pytest.raises(ValueError, match="the model's own error"):
        Engine(model, (2,), SIZE)


def test_out_of_memory_says_how_much(model, log):
    log.failures["capture_end"] = torch.OutOfMemoryError("Tried to allocate 123456789 bytes")
    with pytest.raises(MemoryLimitError, match=r"batch 2, 33 x 33 pixels.*123456789 bytes.*split"):
        Engine(model, (2,), SIZE)


def test_calls_on_other_streams_wait_for_each_other(model, log):
    engine = Engine(model, (2,), SIZE)
    engine(batch(2))
    log.events.clear()
    engine(batch(2))
    assert log.count("wait_event") == 0, "on one stream the order is given"
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in streams:
        with torch.cuda.stream(stream):
            engine(batch(2))
    waits = [whom for what, whom in log.events if what == "wait_event"]
    assert [stream for stream, _ in waits] == list(streams) and len({event for _, event in waits}) == 1
    order = [what for what, _ in log.events]
    assert order.index("wait_event") < len(order) - order[::-1].index("replay")
    assert order[-1] == "record", "the end of a call is recorded after its copies"


def test_threads_take_turns(model, log):
    engine = Engine(model, (1, 2, 4), SIZE)
    inputs = [batch(1 + index % 5, seed=index) for index in range(6)]
    expected = [direct(model, x) for x in inputs]
    wrong: list[int] = []

    def work(start: int) -> None:
        mine = range(start, len(inputs), 2)
        wrong.extend(index for index in mine if not close(engine(inputs[index]), expected[index]))

    workers = [threading.Thread(target=work, args=(start,)) for start in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong and not any(worker.is_alive() for worker in workers)
