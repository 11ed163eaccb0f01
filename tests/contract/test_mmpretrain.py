"""`patch` on mmpretrain's own RIFormer: the backbone alone and inside ImageClassifier, every form it is built in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from riformer.randomize import randomize_
from support_compare import OpCounter
from support_mmpretrain import import_mmpretrain

import riformer_kernels
from riformer_kernels import numerics
from riformer_kernels.errors import PatchError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"layers": [1, 2, 1, 1], "embed_dims": [8, 16, 24, 40], "mlp_ratios": [4, 3, 2, 4]}
NORMS = {"gn": {"type": "GN", "num_groups": 1}, "ln": {"type": "LN2d"}}


@pytest.fixture(scope="module")
def mm():
    return import_mmpretrain()


def backbone(mm, arch="s12", norm="gn", deploy=False, out_indices=(6,), **options):
    config = {"arch": copy.deepcopy(arch), "norm_cfg": dict(NORMS[norm]), "out_indices": list(out_indices)}
    return randomize_(mm.models.RIFormer(deploy=deploy, **config, **options), 1).eval()


def classifier(mm, arch=TINY, classes=10, **options):
    inner = backbone(mm, arch, **options)
    width = inner.network[-1][0].dim
    model = mm.models.ImageClassifier(
        backbone=inner,
        neck=mm.models.GlobalAveragePooling(),
        head=mm.models.LinearClsHead(num_classes=classes, in_channels=width),
    )
    return randomize_(model, 2).eval()


def images(size=(64, 64), batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


def check_ratios(model, x, run):
    """`run(model)` patched and plain, against float64 on the same rounded parameters."""
    with torch.inference_mode():
        eager = run(model, x)
        golden = run(copy.deepcopy(model).double(), x.double())
        handle = riformer_kernels.patch(model)
        with OpCounter() as counter:
            ours = run(model, x)
    assert counter.calls["block_"] == sum(row.total for row in handle.report if row.kind == "stage")
    for mine, theirs, exact in zip(ours, eager, golden, strict=True):
        ratios = numerics.compare(mine, theirs, exact)
        assert ratios.passed, ratios.exceeded
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    return handle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_backbone(mm, norm, deploy, dtype):
    model = backbone(mm, "s12", norm, deploy, out_indices=(0, 2, 4, 6)).to(dtype)
    original = type(model)
    handle = check_ratios(model, images(dtype=dtype), lambda m, x: m(x))
    assert isinstance(model, mm.models.RIFormer)
    assert sum(row.fused for row in handle.report if row.kind == "stage") == 10 + 2
    handle.restore()
    assert type(model) is original


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
def test_custom_arch_and_odd_size(mm, deploy):
    check_ratios(backbone(mm, TINY, deploy=deploy, out_indices=(0, 1, 3, 6)), images((75, 50), 3), lambda m, x: m(x))


def test_classifier_predicts_the_same(mm):
    model = classifier(mm)
    x = images(batch=4)
    with torch.inference_mode():
        before = [sample.pred_label.item() for sample in model.predict(x)]
        handle = riformer_kernels.patch(model)
        with OpCounter() as counter:
            after = [sample.pred_label.item() for sample in model.predict(x)]
    assert before == after and counter.calls["block_"] == 5
    outside = [row for row in handle.report if row.kind == "outside"]
    assert {"neck", "head"} <= {row.name for row in outside}
    assert all(row.fused == row.total for row in handle.report if row.kind != "outside")


def test_classifier_extracts_features_through_the_kernels(mm):
    check_ratios(classifier(mm), images(batch=3), lambda m, x: m.extract_feat(x, stage="backbone"))


def test_deploying_after_patching_is_seen(mm):
    """mmpretrain's own switch swaps submodules under the patch."""
    model = backbone(mm, TINY)
    x = images()
    with torch.inference_mode():
        before = model(x)[0]
        riformer_kernels.patch(model)
        model.switch_to_deploy()
        with OpCounter() as counter:
            after = model(x)[0]
    assert counter.calls["block_"] == 5
    assert model.network[0][0].deploy and torch.allclose(before, after, atol=1e-3, rtol=1e-4)


def test_training_goes_through_mmpretrain_itself(mm):
    model = classifier(mm)
    riformer_kernels.patch(model)
    with pytest.warns(UserWarning, match="inference_mode"):
        loss = model.extract_feat(images())[0].square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.backbone.network.parameters())


def test_copies_and_pickles(mm):
    model = backbone(mm, TINY)
    x = images()
    riformer_kernels.patch(model)
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.inference_mode():
        expected = model(x)[0]
        for other in (twin, loaded):
            assert torch.equal(other(x)[0], expected)
            next(other.parameters()).zero_()
        assert torch.equal(model(x)[0], expected) and not torch.equal(twin(x)[0], expected)


@pytest.mark.parametrize(
    ("norm_cfg", "act_cfg", "reason"),
    [
        ({"type": "BN"}, {"type": "GELU"}, "BatchNorm2d"),
        ({"type": "GN", "num_groups": 2}, {"type": "GELU"}, "group"),
        ({"type": "GN", "num_groups": 1}, {"type": "ReLU"}, "ReLU"),
    ],
)
def test_what_cannot_be_fused_is_named(mm, norm_cfg, act_cfg, reason):
    model = mm.models.RIFormer(arch=copy.deepcopy(TINY), norm_cfg=norm_cfg, act_cfg=act_cfg, out_indices=[6]).eval()
    original = type(model)
    with pytest.raises(PatchError, match=reason):
        riformer_kernels.patch(model)
    assert type(model) is original
