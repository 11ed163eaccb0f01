"""Our RIFormer against mmpretrain's: same names, same numbers, in both directions and both forms."""

from __future__ import annotations

import copy

import pytest
import riformer
import torch
from support_mmpretrain import import_mmpretrain
from support_riformer import relative

TINY = {"layers": [1, 2, 1, 1], "embed_dims": [8, 16, 24, 40], "mlp_ratios": [4, 3, 2, 4]}
ARCHS = {"s12": "s12", "tiny": TINY}
NORMS = {"gn": {"type": "GN", "num_groups": 1}, "ln": {"type": "LN2d"}}
SIZES = {"s12": (64, 64), "tiny": (75, 50)}


@pytest.fixture(scope="module")
def mm():
    return import_mmpretrain()


def build_theirs(mm, arch: str, norm: str = "gn", deploy: bool = False, out_indices=(6,)):
    # copies: mmpretrain writes into the lists that it is given
    config = {"arch": copy.deepcopy(ARCHS[arch]), "norm_cfg": dict(NORMS[norm]), "out_indices": list(out_indices)}
    return mm.models.RIFormer(deploy=deploy, **config).eval()


def images(arch: str, dtype=torch.float64, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 3, *SIZES[arch], generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("arch", ARCHS)
def test_same_names_and_shapes(mm, arch, norm, deploy):
    theirs = build_theirs(mm, arch, norm, deploy).state_dict()
    ours = riformer.RIFormer(ARCHS[arch], norm=norm, deploy=deploy).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("arch", ARCHS)
def test_same_features(mm, arch, norm, deploy, dtype):
    out_indices = (0, 3, 6)
    theirs = build_theirs(mm, arch, norm, deploy, out_indices).to(dtype)
    ours = riformer.RIFormer(ARCHS[arch], norm=norm, deploy=deploy, out_indices=out_indices).eval().to(dtype)
    riformer.randomize_(theirs, 3)
    ours.load_state_dict(theirs.state_dict())
    x = images(arch, dtype)
    with torch.inference_mode():
        expected, found = theirs(x), ours(x)
    assert len(found) == len(expected) == 3
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        assert relative(f, e) <= (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("arch", ARCHS)
def test_their_deploy_and_ours_agree(mm, arch, norm):
    theirs = riformer.randomize_(build_theirs(mm, arch, norm).double(), 4)
    ours = riformer.RIFormer(ARCHS[arch], norm=norm).eval().double()
    ours.load_state_dict(theirs.state_dict())
    before = theirs(images(arch))[0]
    theirs.switch_to_deploy()
    ours.switch_to_deploy()
    assert sorted(theirs.state_dict()) == sorted(ours.state_dict())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-14, atol=1e-15)
    with torch.inference_mode():
        assert relative(ours(images(arch))[0], before) <= 1e-12
        assert relative(ours(images(arch))[0], theirs(images(arch))[0]) <= 1e-12


@pytest.mark.parametrize("out_indices", [-1, [-1], [0, -3], [6, 2]], ids=str)
def test_out_indices_mean_the_same(mm, out_indices):
    theirs = riformer.randomize_(mm.models.RIFormer(arch=copy.deepcopy(TINY), out_indices=copy.copy(out_indices)), 1)
    ours = riformer.randomize_(riformer.RIFormer(TINY, out_indices=out_indices), 1)
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    x = images("tiny", torch.float32)
    found, expected = ours.eval()(x), theirs.eval()(x)
    assert [relative(f, e) <= 1e-6 for f, e in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
def test_image_classifier(mm, deploy, tmp_path):
    theirs = mm.models.ImageClassifier(
        backbone={"type": "RIFormer", "arch": copy.deepcopy(TINY), "deploy": deploy},
        neck={"type": "GlobalAveragePooling"},
        head={"type": "LinearClsHead", "num_classes": 11, "in_channels": 40},
    ).eval().double()  # fmt: skip
    riformer.randomize_(theirs, 9)
    torch.save({"state_dict": theirs.state_dict(), "meta": {"epoch": 1}}, tmp_path / "classifier.pth")
    state_dict = riformer.load_checkpoint(tmp_path / "classifier.pth")
    ours = riformer.infer_arch(state_dict).build().eval().double()
    result = riformer.load_into(ours, state_dict)
    assert (ours.deploy, ours.num_classes, result.head) == (deploy, 11, "loaded")
    x = images("tiny")
    with torch.inference_mode():
        expected, found = theirs(x), ours(x)
        assert relative(found, expected) <= 1e-12
        assert relative(ours.switch_to_deploy()(x), expected) <= 1e-12


@pytest.mark.parametrize("to_deploy", [False, True], ids=["into-train", "into-deploy"])
@pytest.mark.parametrize("from_deploy", [False, True], ids=["from-train", "from-deploy"])
def test_our_weights_into_their_classifier(mm, from_deploy, to_deploy):
    ours = riformer.RIFormer(TINY, num_classes=11, deploy=from_deploy).eval().double()
    riformer.randomize_(ours, 8)
    theirs = mm.models.ImageClassifier(
        backbone={"type": "RIFormer", "arch": copy.deepcopy(TINY), "deploy": to_deploy},
        neck={"type": "GlobalAveragePooling"},
        head={"type": "LinearClsHead", "num_classes": 11, "in_channels": 40},
    ).eval().double()  # fmt: skip
    riformer.load_into(theirs, ours.state_dict())
    with torch.inference_mode():
        assert relative(theirs(images("tiny")), ours(images("tiny"))) <= 1e-12


def test_the_same_seed_gives_both_the_same_weights(mm):
    theirs = riformer.randomize_(build_theirs(mm, "tiny"), 2).state_dict()
    ours = riformer.randomize_(riformer.RIFormer(TINY), 2).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_drop_path_rates_rise_as_theirs(mm):
    theirs = mm.models.RIFormer(arch=copy.deepcopy(TINY), drop_path_rate=0.3, drop_rate=0.1)
    ours = riformer.RIFormer(TINY, drop_path_rate=0.3, drop_rate=0.1)
    rates = [[getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "layer_scale_1")]
             for model in (ours, theirs)]  # fmt: skip
    assert rates[0] == rates[1] and rates[0][-1] == pytest.approx(0.3)
    assert ours.network[0][0].mlp.drop.p == theirs.network[0][0].mlp.drop.p == 0.1
    riformer.randomize_(ours, 1), riformer.randomize_(theirs, 1)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        outputs.append(model.train()(images("tiny", torch.float32))[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_a_real_history_buffer_and_config_are_read(mm, tmp_path):
    """The files that mmengine really writes, not a model of them."""
    import numpy as np
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    buffer = HistoryBuffer()
    buffer.update(0.5)
    content = {
        "state_dict": {"backbone.patch_embed.proj.bias": torch.ones(3)},
        "message_hub": {"log_scalars": {"loss": buffer}, "runtime_info": {"lr": np.float64(0.1), "n": np.arange(3)}},
        "meta": {"cfg": ConfigDict(a=1, b={"c": [ConfigDict(d=2)]})},
    }
    torch.save(content, tmp_path / "epoch_1.pth")
    assert riformer.load_checkpoint(tmp_path / "epoch_1.pth")["patch_embed.proj.bias"].tolist() == [1, 1, 1]
