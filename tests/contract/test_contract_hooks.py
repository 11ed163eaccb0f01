"""Hooks and dropout: what the fused path would hide is left to the original modules, also when it comes later."""

from __future__ import annotations

import warnings

import pytest
import torch
from support_compare import close

from riformer_kernels import patch

PATHS = ["network.2.0.mlp.fc1", "network.2.0", "network.2.0.norm2", "network.2.0.drop_path", "network.2", "network.3",
         "network.3.proj", "patch_embed", "norm4", "head", "head.fc"]  # fmt: skip


def run(model, images):
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        return model(images), [str(entry.message) for entry in seen]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_fires_with_the_originals_values(make, images, backend, path, when):
    seen: list[torch.Tensor] = []
    model = make(num_classes=10, out_indices=(4, 6))
    hook = lambda module, inputs, output: seen.append(output)  # noqa: E731
    handle = model.get_submodule(path).register_forward_hook(hook)
    expected, _ = run(model, images)
    wanted = [value.clone() for value in seen]
    seen.clear()
    if when == "after":
        handle.remove()
        patched = patch(model, backend=backend)
        assert close(run(model, images)[0], expected) and seen == []
        model.get_submodule(path).register_forward_hook(hook)
    else:
        patched = patch(model, backend=backend, strict=False)
        assert seen == [], "verification is none of the user's batches"
    result, said = run(model, images)
    assert close(result, expected) and len(seen) == len(wanted) == (2 if path.endswith("drop_path") else 1)
    # What a hook keeps is not written over by the in-place blocks that follow.
    assert all(close(mine, theirs) for mine, theirs in zip(seen, wanted, strict=True))
    reported = [row for row in patched.report if row.reason and "hook" in row.reason]
    assert len(reported) == 1 and path.startswith(reported[0].name)
    assert (len(said) == 1 and "no longer fused" in said[0]) if when == "after" else said == []
    assert run(model, images)[1] == [], "said once"


def test_a_hooks_input_is_kept_intact(make, images, backend):
    kept = []
    model = make(num_classes=10)
    model.network[2][1].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    run(model, images)
    patch(model, backend=backend, strict=False)
    run(model, images)
    assert close(kept[1], kept[0])


def test_a_norm_hooks_input_is_kept_intact(make, images, backend):
    """Position 1 is a downsampling, whose tokens the next stage would otherwise overwrite."""
    kept = []
    model = make(out_indices=(1, 6))
    model.norm1.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    run(model, images)
    patch(model, backend=backend, strict=False)
    run(model, images)
    assert close(kept[1], kept[0])


def test_a_hook_that_changes_the_result_does(make, images, backend):
    model = make(num_classes=10)
    patch(model, backend=backend)
    plain, _ = run(model, images)
    handle = model.network[2][0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    changed, _ = run(model, images)
    expected, _ = run(torch.nn.Module.__call__.__get__(model), images)
    assert not close(changed, plain) and close(changed, expected)
    handle.remove()
    assert close(run(model, images)[0], plain), "fused again when the hook is gone"


def test_only_that_block_is_left(make, images, backend, count_ops):
    model = make(num_classes=10)
    model.network[2][0].mlp.fc1.register_forward_hook(lambda *args: None)
    patch(model, backend=backend, strict=False)
    with torch.no_grad():
        calls = count_ops(lambda: model(images))
    # The block after the unfused one reads what a hook may hold, so it writes to a new tensor.
    assert (calls["block_"], calls["block"], calls["moments"]) == (6, 1, 1)


def test_hooks_on_the_patched_module_itself_are_its_own(model, images, backend, count_ops):
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    patch(model, backend=backend)
    with torch.no_grad():
        calls = count_ops(lambda: model(images))
    assert seen == [(2, 10)] and calls["block_"] == 8


@pytest.mark.parametrize("option", ["drop_rate", "drop_path_rate"])
def test_dropout_in_training_mode(make, images, backend, count_ops, option):
    model = make(num_classes=10, **{option: 0.5})
    patch(model, backend=backend)
    with torch.no_grad():
        torch.manual_seed(0)
        model.train()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = model(images)
        assert seen and "active while training" in str(seen[0].message)
        torch.manual_seed(0)
        assert close(found, type(model)._original_class.forward(model, images)), "the same draws in the same order"
        model.eval()
        assert count_ops(lambda: model(images))["block_"] == 8


def test_a_second_patcher_after_ours(make, images, backend):
    model = make(num_classes=10)
    patch(model, backend=backend)
    mlp = model.network[2][0].mlp
    original = mlp.forward
    mlp.forward = lambda x: 3 * original(x)
    changed, said = run(model, images)
    assert "replaced on the instance" in said[0]
    with torch.no_grad():
        assert close(changed, type(model)._original_class.forward(model, images))


def test_a_changed_activation_after_patching(make, images, backend):
    model = make(num_classes=10)
    patch(model, backend=backend)
    model.network[2][0].mlp.act.approximate = "tanh"
    model.network[4][0].mlp.act = torch.nn.ReLU()
    found, said = run(model, images)
    assert len(said) == 1 and "network.2.0: mlp.act is GELU(approximate='tanh')" in said[0] and "network.4.0" in said[0]
    with torch.no_grad():
        assert close(found, type(model)._original_class.forward(model, images))
