"""Copies, pickles, replicas and threads of a patched model."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from riformer.model import RIFormer
from support_compare import close
from support_paths import ROOT
from torch import nn

from riformer_kernels import BackendError, PatchError, backends, patch, unpatch
from riformer_kernels.fused import FusedBackbone, fused_class
from riformer_kernels.modules import STATE
from riformer_kernels.patch_state import traced_plan


def test_a_deepcopy_uses_its_own_weights(model, make, images, backend, count_ops):
    handle = patch(model, backend=backend)
    with torch.inference_mode():
        before = model(images)
        twin = copy.deepcopy(model)
        assert isinstance(twin, RIFormer) and type(twin) is type(model)
        twin.load_state_dict(make(seed=5, num_classes=10).state_dict())
        assert torch.equal(model(images), before), "the original keeps its weights"
        found = []
        assert count_ops(lambda: found.append(twin(images)))["block_"] == 8
        assert close(found[0], make(seed=5, num_classes=10)(images))
    assert unpatch(twin) == 1 and type(twin) is RIFormer and handle.active
    unpatched = copy.deepcopy(model)
    handle.restore()
    assert isinstance(unpatched, FusedBackbone), "the copy is patched on its own"


def test_a_state_whose_module_is_gone_says_so(make, images, backend):
    """Two modules with one instance dictionary share a state, which belongs to the first of them."""
    model = make(num_classes=10)
    patch(model, backend=backend)
    twin = type(model).__new__(type(model))
    twin.__dict__ = dict(vars(model))
    number = vars(twin)[STATE].number
    assert traced_plan(number).reasons() == {}
    with torch.inference_mode():
        assert torch.equal(twin(images), model(images)) and torch.equal(twin(images), model(images))
        twin(images)  # the program that the state keeps is the twin's now
    del model
    gc.collect()
    with pytest.raises(PatchError, match=r"is gone.*copy\.deepcopy"):
        traced_plan(number)
    alone = pickle.loads(pickle.dumps(vars(twin)[STATE]))
    with pytest.raises(PatchError, match="is gone"):
        alone.owner()


def test_a_fused_class_lives_as_long_as_the_original():
    class Own(RIFormer):
        pass

    made = fused_class(Own)
    assert fused_class(Own) is made and issubclass(made, Own) and made is not fused_class(RIFormer)
    classes = weakref.ref(Own), weakref.ref(made)
    del Own, made
    gc.collect()
    assert [reference() for reference in classes] == [None, None]


def test_copy_copy(model, images, backend):
    patch(model, backend=backend)
    twin = copy.copy(model)
    assert vars(twin)[STATE] is not vars(model)[STATE]
    with torch.inference_mode():
        assert torch.equal(twin(images), model(images))
    unpatch(twin)
    assert type(twin) is RIFormer and isinstance(model, FusedBackbone)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(model, images, backend, protocol):
    patch(model, backend=backend)
    twin = pickle.loads(pickle.dumps(model, protocol))
    assert isinstance(twin, FusedBackbone) and list(twin.state_dict()) == list(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(twin(images), model(images))
    assert unpatch(twin) == 1 and repr(twin) == repr(copy.deepcopy(twin))


SCRIPT = """
import sys, pickle, torch
path, backend, out = sys.argv[1:]
model = torch.load(path, weights_only=False)
import riformer_kernels
from torch.utils._python_dispatch import TorchDispatchMode
assert type(model).__name__ == "FusedRIFormer", type(model)
with torch.inference_mode():
    torch.save(model(torch.load(out)), out)
print(riformer_kernels.unpatch(model), type(model).__name__)
"""


def test_torch_save_into_another_process(model, images, backend, tmp_path):
    patch(model, backend=backend)
    torch.save(model, tmp_path / "model.pt")
    torch.save(images, tmp_path / "data.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model.pt"), backend, str(tmp_path / "data.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "RIFormer"]
    with torch.inference_mode():
        assert close(torch.load(tmp_path / "data.pt"), model(images))


def test_a_pickle_where_the_backend_is_unusable(model, backend, monkeypatch):
    import dataclasses

    patch(model, backend=backend)
    data = pickle.dumps(model)
    gone = dataclasses.replace(backends.ALL[backend], unusable=lambda: "not built: no compiler")
    monkeypatch.setitem(backends.ALL, backend, gone)
    with pytest.raises(BackendError, match=r"saved while patched.*not built.*unpatch"):
        pickle.loads(data)


def replicate(module: nn.Module, change) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` does for one device, without one."""
    modules = list(module.modules())
    replicas = {inner: inner._replicate_for_data_parallel() for inner in modules}
    for inner, replica in replicas.items():
        replica._former_parameters = {}
        for name, value in inner._modules.items():
            if value is not None:
                setattr(replica, name, replicas[value])
        for name, value in inner._parameters.items():
            setattr(replica, name, None if value is None else change(value))
            if value is not None:
                replica._former_parameters[name] = getattr(replica, name)
    return replicas[module]


def test_a_data_parallel_replica_uses_its_own_tensors(make, images, backend, count_ops):
    model = make(num_classes=10)
    patch(model, backend=backend)
    doubled = make(num_classes=10)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(1.25)
        replica = replicate(model, lambda value: value.detach() * 1.25)
        assert type(replica) is type(model)
        found = []
        assert count_ops(lambda: found.append(replica(images)))["block_"] == 8
        assert close(found[0], doubled(images)) and not close(model(images), found[0])
        assert close(model(images), make(num_classes=10)(images)), "the original is untouched"


@pytest.mark.filterwarnings("ignore:patched RIFormer.*gradients are due")
def test_a_replica_in_training_has_gradients(make, images, backend):
    model = make(num_classes=10)
    patch(model, backend=backend)
    replica = replicate(model, lambda value: value * 1.0)
    result = replica(images)
    assert result.requires_grad
    result.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_threads(make, backend):
    model = make(num_classes=10)
    batches = [torch.randn(1 + i % 3, 3, 32 + 8 * i, 40, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    with torch.inference_mode():
        expected = [model(batch) for batch in batches]
    # A copy has derived nothing yet: all threads start with that.
    patch(model, backend=backend)
    model = copy.deepcopy(model)
    wrong: list[object] = []
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait()
        try:
            with torch.inference_mode():
                wrong.extend(index for _ in range(10) if not close(model(batches[index]), expected[index]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_patching_from_several_threads(make, images, backend):
    model = make(num_classes=10)
    errors: list[Exception] = []

    def work() -> None:
        try:
            patch(model, backend=backend)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and type(model)._original_class is RIFormer
    assert unpatch(model) == 1 and type(model) is RIFormer


def test_a_wrapper_around_the_model(make, images, backend, count_ops):
    model = make(num_classes=10)
    with torch.inference_mode():
        expected = model(images)
        wrapped = nn.DataParallel(model)
        handle = patch(wrapped, backend=backend)
        found = []
        assert count_ops(lambda: found.append(wrapped(images)))["block_"] == 8
    assert close(found[0], expected) and handle.report[0].name == "module.patch_embed"
