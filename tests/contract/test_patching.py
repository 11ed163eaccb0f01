"""``patch``, the handle, ``unpatch``: what a person sees."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from riformer.model import RIFormer
from support_compare import close
from support_models import TINY
from torch import nn

import riformer_kernels
from riformer_kernels import BackendError, InputError, PatchError, VerificationError, backends, ops, patch, unpatch
from riformer_kernels.fused import FusedBackbone
from riformer_kernels.modules import STATE


def snapshot(model: nn.Module) -> tuple:
    """Everything about a model that patching must give back."""
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()},
        list(model.state_dict()),
        repr(model),
        [(id(p), p._version, p.requires_grad) for p in model.parameters()],
    )


def test_the_patched_model_computes_the_same_through_the_ops(model, images, backend, count_ops):
    with torch.inference_mode():
        expected = model(images)
        handle = patch(model, backend=backend)
        found = []
        calls = count_ops(lambda: found.append(model(images)))
    assert close(found[0], expected)
    assert calls["block_"] == 8 and calls["embed"] == 4 and calls["head"] == 1 and calls["block"] == calls["norm"] == 0
    assert calls["moments"] == 0, "the stem, downsampling and block ops deliver the moments"
    assert handle.active


@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_features_at_every_output(make, images, backend, count_ops, norm, deploy, channels_last):
    model = make(norm=norm, deploy=deploy, out_indices=(0, 1, 4, 6))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    with torch.inference_mode():
        expected = model(images)
        patch(model, backend=backend)
        found = []
        calls = count_ops(lambda: found.extend(model(images)))
    assert close(tuple(found), expected)
    assert all(feature.is_contiguous(memory_format=layout) for feature in found)
    assert calls["norm"] == 4 and calls["block_"] == 8


def test_restore_gives_back_the_very_same(model, images, backend):
    before = snapshot(model)
    with torch.inference_mode():
        expected = model(images)
        handle = patch(model, backend=backend)
        assert snapshot(model) != before
        handle.restore()
        assert snapshot(model) == before
        assert type(model) is RIFormer and STATE not in vars(model) and not handle.active
        assert torch.equal(model(images), expected)
        handle.restore()
        assert snapshot(model) == before


def test_patching_leaves_keys_isinstance_and_parameters(model, backend):
    keys, ids = list(model.state_dict()), [id(p) for p in model.parameters()]
    patch(model, backend=backend)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == ids
    assert isinstance(model, RIFormer) and isinstance(model, FusedBackbone) and "FusedRIFormer" in repr(model)


def test_classes_are_never_touched(make, backend):
    forward, attributes = RIFormer.forward, set(vars(RIFormer))
    one, two = make(num_classes=5), make(num_classes=5)
    patch(one, backend=backend)
    assert RIFormer.forward is forward and set(vars(RIFormer)) == attributes
    assert type(two) is RIFormer and RIFormer(TINY).forward.__func__ is forward
    three = make()
    patch(three, backend=backend)
    assert type(three) is type(one), "one subclass per class"


def test_unpatch(model, backend):
    before = snapshot(model)
    patch(model, backend=backend)
    assert unpatch(nn.Sequential(model)) == 1
    assert snapshot(model) == before and unpatch(model) == 0


def test_context_manager_restores_also_after_an_exception(model, backend):
    before = snapshot(model)
    with patch(model, backend=backend) as handle:
        assert handle.active
    assert snapshot(model) == before

    def fail_while_patched() -> None:
        with patch(model, backend=backend):
            assert isinstance(model, FusedBackbone)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_patched()
    assert snapshot(model) == before


def test_patching_twice_is_idempotent(model, images, backend):
    first = patch(model, backend=backend)
    cls, state = type(model), vars(model)[STATE]
    with patch(model, backend=backend) as second:
        assert type(model) is cls and vars(model)[STATE] is state
        assert second.report == first.report and second.verification == first.verification
    assert first.active, "leaving an inner `with` does not undo the outer patch"
    second.restore()
    assert type(model) is RIFormer and not first.active
    with torch.inference_mode():
        model(images)


def test_patching_again_with_other_options_is_an_error(model, backend):
    handle = patch(model, backend=backend)
    with pytest.raises(PatchError, match=r"already patched.*unpatch"):
        patch(model, backend=backend, compute_dtype=torch.bfloat16)
    assert handle.active


def test_a_second_patch_verifies_what_the_first_did_not(model, backend):
    assert patch(model, backend=backend, verify=False).verification is None
    assert patch(model, backend=backend).verification[""].passed


def test_nested_backbones(make, images, backend):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.neck = make(seed=1), nn.ModuleDict({"inner": make(seed=2)}), nn.Identity()

        def forward(self, x):
            return self.neck((self.left(x)[0], self.right["inner"](x)[0]))

    pair = Pair()
    with torch.inference_mode():
        expected = pair(images)
        handle = patch(pair, backend=backend)
        assert close(pair(images), expected)
    rows = {row.name: row for row in handle.report}
    assert rows["left.network.4"].fused == rows["right.inner.network.4"].total == 2
    assert rows["neck"].kind == "outside" and "not part of the backbone" in rows["neck"].reason
    assert set(handle.verification) == {"left", "right.inner"}
    handle.restore()
    assert type(pair.left) is type(pair.right["inner"]) is RIFormer


def test_report_and_table(model, backend):
    handle = patch(model, backend=backend)
    rows = handle.report
    assert [row.kind for row in rows] == ["stem", *["stage", "downsample"] * 3, "stage", "norm", "head"]
    assert all(row.reason is None and row.backend.startswith(backend) and row.dtype == "float32" for row in rows)
    assert sum(row.fused for row in rows if row.kind == "stage") == 8
    assert rows[1].as_dict() == {
        "name": "network.0", "kind": "stage", "backend": rows[1].backend, "dtype": "float32", "fused": 2, "total": 2,
        "reason": None,
    }  # fmt: skip
    text = str(handle)
    lines = text.splitlines()
    assert "8 of 8 blocks fused in RIFormer" in lines[0] and "verification: passed in float32" in text
    start = next(i for i, line in enumerate(lines) if line.startswith("module"))
    column = lines[start].index("backend")
    assert all(line[column:].startswith(backend) for line in lines[start + 2 : start + 2 + len(rows)]), "aligned"
    assert text.isascii() and "\x1b" not in text
    handle.restore()
    assert handle.report == rows and "(restored)" in str(handle) and handle.verification[""].passed


def test_strict_names_modules_and_reasons_and_leaves_the_model(model, backend):
    model.network[4][1].mlp.act = nn.ReLU()
    before = snapshot(model)
    with pytest.raises(PatchError, match=r"network\.4\.1: mlp\.act is ReLU") as error:
        patch(model, backend=backend)
    assert "strict=False" in str(error.value) and "network.4.0" not in str(error.value)
    assert snapshot(model) == before


def test_not_strict_fuses_the_rest_and_reports(model, images, backend, count_ops):
    model.network[4][1].mlp.act = nn.ReLU()
    with torch.inference_mode():
        expected = model(images)
        handle = patch(model, backend=backend, strict=False)
        found = []
        calls = count_ops(lambda: found.append(model(images)))
    assert close(found[0], expected)
    assert calls["block_"] == 7 and calls["moments"] == 0, "the downsampling after the unfused block makes its moments"
    row = next(row for row in handle.report if row.name == "network.4")
    assert (row.fused, row.total) == (1, 2) and row.reason.startswith("block 1: mlp.act is ReLU")
    assert "7 of 8 blocks fused" in str(handle)


def test_verification_error_restores(model, backend, monkeypatch):
    plain = backends.ALL[backend]

    def broken(*arguments):
        out, moments = plain.ops["block"](*arguments)
        return out * 1.01, moments

    monkeypatch.setitem(
        backends.ALL, backend, dataclasses.replace(plain, ops={**plain.ops, "block": broken}, prepare=None)
    )
    before = snapshot(model)
    with pytest.raises(VerificationError, match=r"network.0.0"):
        patch(model, backend=backend)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not, and does not contain, a RIFormer"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "its children are 0: Conv2d, 1: ReLU"),
        (lambda: "s12", "expected a torch.nn.Module.*found str"),
    ],
)
def test_not_a_riformer(build, message):
    with pytest.raises(PatchError, match=message):
        patch(build())


def test_a_poolformer_is_not_a_riformer(make):
    model = make()
    for stage in model.network[::2]:
        for block in stage:
            block.token_mixer = nn.AvgPool2d(3, 1, 1)
    with pytest.raises(PatchError, match="token mixer is AvgPool2d"):
        patch(model)


def test_mixed_dtypes_and_meta(make, backend):
    model = make()
    model.network[2].half()
    before = snapshot(model)
    with pytest.raises(PatchError, match=r"different dtypes.*float32.*float16"):
        patch(model, backend=backend)
    assert snapshot(model) == before
    model = make()
    model.network[2].to("meta")
    with pytest.raises(PatchError, match=r"different devices.*cpu.*meta"):
        patch(model, backend=backend)
    with pytest.raises(PatchError, match="meta device"):
        patch(make().to("meta"), backend=backend)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_and_scripted(make, backend):
    with pytest.raises(PatchError, match="ScriptModule"):
        patch(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), backend=backend)
    model = make()
    model.patch_embed.proj = nn.Sequential(model.patch_embed.proj)
    with pytest.raises(PatchError, match="no plain weight"):
        patch(model, backend=backend)


def test_unknown_backend_and_unserved_dtype(make):
    model = make()
    before = snapshot(model)
    with pytest.raises(BackendError, match="unknown backend 'cpuu'"):
        patch(model, backend="cpuu")
    assert snapshot(model) == before
    with pytest.raises(BackendError, match="float64"):
        patch(make().double(), backend="cpu")
    with pytest.raises(PatchError, match=r"compute_dtype must be a torch.dtype"):
        patch(model, backend="reference", compute_dtype="bf16")


def test_all_or_nothing_over_several_backbones(make, backend):
    pair = nn.ModuleList([make(), make()])
    pair[1].network[0][0].mlp.act = nn.ReLU()
    with pytest.raises(PatchError, match=r"1\.network\.0\.0: mlp\.act"):
        patch(pair, backend=backend)
    assert type(pair[0]) is type(pair[1]) is RIFormer


def test_a_forward_replaced_on_the_instance_is_another_patchers(make, backend):
    model = make()
    model.forward = lambda x: x
    with pytest.raises(PatchError, match="another patcher"):
        patch(model, backend=backend)
    assert type(model) is RIFormer


def test_a_backbone_with_another_forward_fails_verification(make, backend, images):
    class Last(RIFormer):
        def forward(self, x):
            return super().forward(x)[-1].mean((2, 3))

    model = make()
    model.__class__ = Last
    with pytest.raises(VerificationError, match="forward of Last is not a RIFormer's"):
        patch(model, backend=backend)
    assert type(model) is Last


def test_errors_are_value_errors_for_callers():
    assert issubclass(PatchError, ValueError) and issubclass(InputError, riformer_kernels.RIFormerKernelsError)


def test_a_backend_has_every_op(backend):
    whole = backends.ALL[backend]
    assert list(whole.ops) == list(ops.ALL)
    for name in ops.ALL:
        rest = {key: function for key, function in whole.ops.items() if key != name}
        with pytest.raises(TypeError, match="expected"):
            dataclasses.replace(whole, ops=rest)
