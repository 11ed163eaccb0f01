"""Where gradients are due the original differentiable path runs, and says so once."""

from __future__ import annotations

import warnings

import pytest
import torch
from support_compare import close

from riformer_kernels import patch


def gradients(model, images):
    model.zero_grad()
    model(images).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def caught(function):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        value = function()
    return value, [str(entry.message) for entry in seen if "riformer" in str(entry.message).lower()]


def test_gradients_are_the_originals(model, images, backend, count_ops):
    expected = gradients(model, images)
    patch(model, backend=backend)
    found = []
    calls = count_ops(lambda: found.extend(caught(lambda: gradients(model, images))[0]))
    assert sum(calls.values()) == 0, "no inference kernel where gradients are due"
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_one_warning_per_module_that_names_the_way_out(make, images, backend):
    one, two = make(num_classes=3), make(num_classes=3)
    patch(one, backend=backend), patch(two, backend=backend)
    result, said = caught(lambda: one(images))
    assert result.requires_grad and len(said) == 1
    assert "torch.inference_mode()" in said[0] and "torch.no_grad()" in said[0]
    assert caught(lambda: one(images))[1] == []
    assert len(caught(lambda: two(images))[1]) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradients_due_no_warning(model, images, backend, count_ops, mode):
    patch(model, backend=backend)
    with mode():
        calls = count_ops(lambda: caught(lambda: model(images)))
        _, said = caught(lambda: model(images))
    assert said == [] and calls["block_"] == 8


def test_frozen_parameters_need_no_gradients(model, images, backend, count_ops):
    patch(model, backend=backend)
    model.requires_grad_(False)
    found = []
    assert count_ops(lambda: found.append(model(images)))["block_"] == 8 and not found[0].requires_grad
    (_, said), images = caught(lambda: model(images.requires_grad_())), images
    assert len(said) == 1, "the input wants gradients"
    model.network[6][1].mlp.fc2.bias.requires_grad_(True)
    result, _ = caught(lambda: model(images.detach()))
    assert result.requires_grad, "one parameter wants gradients"


def test_training_step_then_inference(model, images, backend):
    patch(model, backend=backend)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    caught(lambda: gradients(model, images))
    optimizer.step()
    with torch.inference_mode():
        found = model(images)
        assert close(found, type(model)._original_class.forward(model, images))


def test_functional_gradients(model, images, backend):
    """torch.func transforms too: their tensors say that they require gradients."""
    expected = torch.func.grad(lambda x: model(x).sum())(images)
    patch(model, backend=backend)
    found, _ = caught(lambda: torch.func.grad(lambda x: model(x).sum())(images))
    assert torch.equal(found, expected)
