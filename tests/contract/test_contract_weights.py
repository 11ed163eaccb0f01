"""Stale weights are a wrong answer: whatever changes a weight, the next forward computes with it."""

from __future__ import annotations

import copy

import pytest
import torch
from support_compare import close
from torch import nn

from riformer_kernels import BackendError, patch


def copied_data(model, other):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        version, pointer = mine._version, mine.data_ptr()
        mine.data.copy_(theirs.data)
        assert mine._version == version and mine.data_ptr() == pointer, "the change that nothing records"


def assigned_data(model, other):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()


def new_parameters(model, other):
    for name, theirs in other.named_parameters():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Parameter(theirs.detach().clone()))


def optimizer_step(model, other):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.grad = (mine - theirs).detach()
    optimizer.step()
    optimizer.zero_grad()


def averaged(model, other):
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), list(other.parameters()), 1.0)


CHANGES = {
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "load_state_dict(assign=True)": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "p.data.copy_": copied_data,
    "p.data =": assigned_data,
    "new Parameter": new_parameters,
    "optimizer step": optimizer_step,
    "EMA by foreach": averaged,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("deploy", [False, True])
def test_changed_weights_are_used(make, images, backend, change, deploy):
    model, other = (make(seed=seed, num_classes=10, deploy=deploy) for seed in (1, 2))
    patch(model, backend=backend)
    with torch.inference_mode():
        before, expected = model(images), other(images)
    assert not close(before, expected)
    CHANGES[change](model, other)
    with torch.inference_mode():
        assert close(model(images), expected)


def test_every_single_parameter_is_read_anew(make, images, backend):
    model = make(num_classes=10, norm="gn")
    patch(model, backend=backend)
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            before = model(images)
            parameter.data.mul_(1.5)
            assert not torch.equal(model(images), before), name


def test_a_replaced_submodule_is_used(make, images, backend):
    model, other = make(seed=1, num_classes=10), make(seed=2, num_classes=7)
    patch(model, backend=backend)
    model.network, model.patch_embed, model.norm6, model.head = (
        other.network,
        other.patch_embed,
        other.norm6,
        other.head,
    )
    with torch.inference_mode():
        assert close(model(images), other(images))


def test_switch_to_deploy_after_patching(make, images, backend, count_ops):
    model = make(num_classes=10)
    with torch.inference_mode():
        expected = model(images)
        patch(model, backend=backend)
        assert close(model(images), expected)
        model.switch_to_deploy()
        found = []
        calls = count_ops(lambda: found.append(model(images)))
    assert close(found[0], expected) and calls["block_"] == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moved_to_another_dtype(make, images, backend, dtype):
    model = make(num_classes=10)
    patch(model, backend=backend)
    original = copy.deepcopy(model)
    model.to(dtype)
    with torch.inference_mode():
        result, expected = model(images.to(dtype)), original(images)
    assert result.dtype == dtype and close(result.float(), expected, 5e-2)
    model.float()
    with torch.inference_mode():
        assert model(images).dtype == torch.float32


def test_moved_where_no_kernel_is(make, images, backend):
    model = make(num_classes=10)
    patch(model, backend=backend)
    expected = None
    with torch.inference_mode():
        expected = model(images)
        model.double()
        if backend == "reference":
            assert model(images.double()).dtype == torch.float64
        else:
            with pytest.raises(BackendError, match="float64"):
                model(images.double())
        model.float()
        assert close(model(images), expected), "usable again afterwards"


def test_functional_call(make, images, backend, count_ops):
    model, other = make(seed=1, num_classes=10), make(seed=2, num_classes=10)
    patch(model, backend=backend)
    parameters = {name: value.detach() for name, value in other.named_parameters()}
    with torch.no_grad():
        found = []
        calls = count_ops(lambda: found.append(torch.func.functional_call(model, parameters, (images,))))
        assert close(found[0], other(images)) and calls["block_"] == 8


def test_changed_eps_is_used(make, images, backend):
    model = make(num_classes=10)
    patch(model, backend=backend)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 0.5
    reference = make(num_classes=10, norm_eps=0.5)
    with torch.inference_mode():
        assert close(model(images), reference(images))
