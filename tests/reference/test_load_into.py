"""Every form loads into every form, all or nothing; and telling an arch from a state dict."""

from __future__ import annotations

import copy

import pytest
import riformer
import torch
from riformer import CheckpointError, RIFormer, load_into, randomize_
from support_riformer import nested, same, snapshot

TINY = {"layers": [1, 2], "embed_dims": [8, 16], "mlp_ratios": [4, 2.5]}


def hard(seed: int = 1, arch=TINY, **options) -> RIFormer:
    return randomize_(RIFormer(arch, **{"num_classes": 5, **options}), seed).eval()


def images(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------- every form into every form


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("to_deploy", [False, True], ids=["into-train", "into-deploy"])
@pytest.mark.parametrize("from_deploy", [False, True], ids=["from-train", "from-deploy"])
@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_both_forms_into_both(norm, from_deploy, to_deploy, dtype):
    source = hard(1, norm=norm, deploy=from_deploy).to(dtype)
    model = hard(2, norm=norm, deploy=to_deploy).to(dtype)
    result = load_into(model, source.state_dict())
    assert (result.folded, result.unfolded) == (3 * (to_deploy > from_deploy), 3 * (from_deploy > to_deploy))
    assert (model.deploy, result.head) == (to_deploy, "loaded")
    x = images(dtype)
    if from_deploy >= to_deploy:  # Nothing is rounded here: not one bit differs.
        assert torch.equal(model(x), source(x))
    error = (model(x) - source(x)).abs().max() / source(x).abs().max()
    assert error <= (1e-12 if dtype == torch.float64 else 5e-6)
    if to_deploy and not from_deploy:
        assert same(snapshot(model), snapshot(source.switch_to_deploy()))


def test_unfolded_affine_is_exactly_two_and_zero():
    source, model = hard(1, deploy=True), hard(2)
    load_into(model, source.state_dict())
    block, deployed = model.network[0][0], source.network[0][0]
    assert torch.equal(block.norm1.weight, deployed.norm_reparam.weight)
    assert block.token_mixer.affine.weight.unique().tolist() == [2.0]
    assert block.token_mixer.affine.bias.unique().tolist() == [0.0]
    assert same(snapshot(model.switch_to_deploy()), snapshot(source))


def test_a_mixed_state_dict_loads():
    source, model = hard(1), hard(2, deploy=True)
    expected = source(images())
    source.network[0][0].switch_to_deploy()
    assert load_into(model, source.state_dict()).folded == 2
    torch.testing.assert_close(model(images()), expected)
    assert not riformer.infer_arch(source.state_dict()).deploy


def test_loading_changes_parameters_in_place_and_rounds_to_their_dtype():
    model, source = hard(2).bfloat16(), hard(1)
    parameters = list(model.parameters())
    load_into(model, source.state_dict())
    assert all(a is b and a.requires_grad for a, b in zip(parameters, model.parameters(), strict=True))
    assert same(snapshot(model), snapshot(copy.deepcopy(source).bfloat16()))


def test_wrapped_model():
    model = hard(2)
    load_into(torch.nn.DataParallel(torch.compile(model, backend="eager")), hard(1).state_dict())
    assert same(snapshot(model), snapshot(hard(1)))


# ------------------------------------------------------------------------------------------ all or nothing, and why not


def without(state_dict, *names):
    return {name: tensor for name, tensor in state_dict.items() if name not in names}


MISFITS = {
    "missing": (lambda s: without(s, "network.0.0.mlp.fc1.weight"), ["missing (1): network.0.0.mlp.fc1.weight"]),
    "half-a-block": (lambda s: without(s, "network.0.0.norm1.bias"), ["missing (1): network.0.0.norm1.bias"]),
    "unexpected": (lambda s: {**s, "extra.weight": torch.zeros(1)}, ["not in the model (1): extra.weight"]),
    "shape": (lambda s: {**s, "norm2.bias": torch.zeros(9)}, ["norm2.bias: found [9], expected [16]"]),
    "affine-shape": (lambda s: {**s, "network.0.0.token_mixer.affine.weight": torch.zeros(8, 1, 3, 3)},
                     ["found [8, 1, 3, 3], expected [8, 1, 1, 1]"]),
    "integers": (lambda s: {**s, "norm2.bias": torch.zeros(16, dtype=torch.int64)}, ["norm2.bias: found torch.int64"]),
    "other-arch": (lambda _: snapshot(hard(arch={"layers": [1, 3], "embed_dims": [8, 16], "mlp_ratios": [4, 2.5]})),
                   ["layers [1, 3]", "layers [1, 2]", "infer_arch(state_dict).build()", "more)"]),
    "other-width": (lambda _: snapshot(hard(arch={"layers": [1, 2], "embed_dims": [8, 24]})),
                    ["widths [8, 24]", "found [24, 8, 3, 3], expected [16, 8, 3, 3]"]),
    "input-channels": (lambda _: snapshot(hard(in_channels=1)), ["found [8, 1, 7, 7], expected [8, 3, 7, 7]"]),
    "no-riformer": (lambda _: {"conv.weight": torch.zeros(1)}, ["looks like no RIFormer", "conv.weight"]),
    "no-head": (lambda s: without(s, "head.fc.weight", "head.fc.bias"), ["no classifier head", "strict_head=False"]),
    "half-a-head": (lambda s: without(s, "head.fc.bias"), ["missing (1): head.fc.bias", "strict_head=False"]),
    "classes": (lambda _: snapshot(hard(num_classes=7)), ["has 7 classes, the model 5 classes", "strict_head=False"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_misfits_are_named_and_nothing_changes(kind):
    make, words = MISFITS[kind]
    model = hard(2)
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_into(model, make(snapshot(hard(1))))
    assert all(word in str(caught.value) for word in ["nothing was changed", *words]), str(caught.value)
    assert same(snapshot(model), before)


def test_misfit_with_a_deployed_model_is_named_too():
    model = hard(2, deploy=True)
    before, bad = snapshot(model), snapshot(hard(1))
    bad["network.0.0.norm1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"network.0.0.norm"):
        load_into(model, bad)
    assert same(snapshot(model), before)


def test_meta_model_is_named():
    with pytest.raises(CheckpointError, match=r"meta device.*to_empty"):
        load_into(RIFormer(TINY).to("meta"), snapshot(hard(num_classes=0)))


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"), [(5, 0, "kept"), (5, 7, "kept"), (0, 5, "ignored"), (5, 5, "loaded"), (0, 0, "none")]
)
def test_strict_head_false(ours, theirs, outcome):
    model, source = hard(2, num_classes=ours), hard(1, num_classes=theirs)
    head = copy.deepcopy(model.head.state_dict()) if ours else {}
    if outcome in ("kept", "ignored"):
        with pytest.raises(CheckpointError, match="strict_head=False"):
            load_into(model, source.state_dict())
    assert load_into(model, source.state_dict(), strict_head=False).head == outcome
    for found, expected in zip(model.forward_features(images()), source.forward_features(images()), strict=True):
        assert torch.equal(found, expected)
    if outcome == "kept":
        assert same(model.head.state_dict(), head)
    if outcome == "loaded":
        assert torch.equal(model(images()), source(images()))


# ---------------------------------------------------------------------------------------------------------- recognising


@pytest.mark.parametrize("arch", ["s12", "s24", "s36", "m36", "m48"])
@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
def test_published_archs_are_recognised(arch, deploy):
    with torch.device("meta"):
        model = RIFormer(arch, deploy=deploy, num_classes=10, in_channels=4)
    info = riformer.infer_arch(model.state_dict())
    assert (info.arch.name, info.deploy, info.num_classes, info.in_channels) == (arch, deploy, 10, 4)
    assert info.arch == riformer.ARCHS[arch]


@pytest.mark.parametrize(
    "arch",
    [TINY, {"layers": [1], "embed_dims": [8]}, {"layers": [2, 1, 1], "embed_dims": [8, 8, 16]},
     {"layers": [1], "embed_dims": [11], "mlp_ratios": [1.4]}],
    ids=["tiny", "one-stage", "equal-widths", "odd-ratio"],
)  # fmt: skip
def test_custom_archs_are_recognised(arch):
    model = hard(1, arch=arch, num_classes=0, out_indices=(0, -1) if len(arch["layers"]) > 1 else 0)
    built = riformer.infer_arch(nested(model.state_dict(), "module.", "backbone.")).build().eval()
    load_into(built, model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(built(images()), model(images()), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"fc.weight": torch.zeros(2)}, "no RIFormer.*fc.weight"),
        (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, r"found \[8, 3, 4, 4\]"),
        (lambda s: {n: t for n, t in s.items() if not n.startswith("network.1.")}, "without a gap"),
        (lambda s: {n: t for n, t in s.items() if not n.startswith("network.2.0.")}, "without a gap"),
        (lambda s: {n: t for n, t in s.items() if not n.startswith("network.")}, "without a gap"),
        (lambda s: {n: t for n, t in s.items() if "network.0.0.mlp" not in n}, "network.0.0.mlp.fc1.weight"),
    ],
    ids=["other", "patch", "no-downsample", "no-block", "no-network", "no-mlp"],
)
def test_what_is_no_riformer_is_named(change, words):
    with pytest.raises(CheckpointError, match=words):
        riformer.infer_arch(change(snapshot(hard())))
