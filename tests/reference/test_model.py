"""The reference model: its shape, its formula, the fold, and what it says to wrong input."""

from __future__ import annotations

import copy
import pickle

import pytest
import riformer
import torch
import torch.nn.functional as F
from riformer import RIFormer, randomize_
from support_riformer import relative
from torch.utils.flop_counter import FlopCounterMode

TINY = {"layers": [1, 2, 1, 1], "embed_dims": [8, 16, 24, 40], "mlp_ratios": [4, 3, 2.5, 4]}


def images(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hard(arch=TINY, seed: int = 1, dtype=torch.float32, **options) -> RIFormer:
    return randomize_(RIFormer(arch, **options), seed).eval().to(dtype)


# ------------------------------------------------------------------------------------------------- size and counts


@pytest.mark.parametrize(
    ("arch", "layers", "channels", "params", "macs_224", "macs_384"),
    [
        ("s12", (2, 2, 6, 2), (64, 128, 320, 512), 11.92, 1.82, 5.36),
        ("s24", (4, 4, 12, 4), (64, 128, 320, 512), 21.39, 3.41, 10.03),
        ("s36", (6, 6, 18, 6), (64, 128, 320, 512), 30.86, 5.00, 14.70),
        ("m36", (6, 6, 18, 6), (96, 192, 384, 768), 56.17, 8.80, 25.87),
        ("m48", (8, 8, 24, 8), (96, 192, 384, 768), 73.47, 11.59, 34.06),
    ],
)
def test_published_sizes(arch, layers, channels, params, macs_224, macs_384):
    found = riformer.resolve_arch(arch)
    assert (found.layers, found.embed_dims) == (layers, channels)
    with torch.device("meta"):
        model = RIFormer(arch, num_classes=1000, deploy=True)
    assert round(riformer.count_parameters(model) / 1e6, 2) == params
    # The table is rounded from figures in whole millions: 5.355 G became 5.36, 25.865 became 25.87.
    assert riformer.count_macs(model, 224) / 1e9 == pytest.approx(macs_224, abs=0.0051)
    assert riformer.count_macs(model, 384) / 1e9 == pytest.approx(macs_384, abs=0.0057)
    assert [len(stage) for stage in model.network[::2]] == list(layers)


def test_macs_are_the_published_ones_to_the_million():
    """mmpretrain's metafile, FLOPs entries."""
    published = {"s12": (1822, 5355), "s24": (3412, 10028), "s36": (5003, 14702), "m36": (8801, 25865),
                 "m48": (11590, 34060)}  # fmt: skip
    for arch, (small, large) in published.items():
        assert abs(riformer.count_macs(arch, 224) / 1e6 - small) < 0.7
        assert abs(riformer.count_macs(arch, 384) / 1e6 - large) < 0.7


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("arch", ["s12", TINY], ids=["s12", "tiny"])
def test_closed_forms_match_a_real_model(arch, deploy):
    model = RIFormer(arch, in_channels=4, num_classes=7, deploy=deploy)
    options = {"in_channels": 4, "num_classes": 7, "deploy": deploy}
    assert riformer.count_parameters(arch, **options) == riformer.count_parameters(model)
    with FlopCounterMode(display=False) as counter:
        model(images(1, 4, 65, 99))
    products = counter.get_total_flops() // 2
    assert riformer.count_macs(arch, (65, 99), count="products", **options) == products
    assert riformer.count_macs(model, (65, 99), count="products") == products


def test_stage_sizes_at_224():
    features = RIFormer("s12", out_indices=(0, 2, 4, 6)).eval()(images(1, 3, 224, 224))
    assert [tuple(f.shape) for f in features] == [(1, 64, 56, 56), (1, 128, 28, 28), (1, 320, 14, 14), (1, 512, 7, 7)]


# ------------------------------------------------------------------------------------------------------ the formula


def manual_norm(x, module, kind):
    dims = (1, 2, 3) if kind == "gn" else (1,)
    mean = x.mean(dims, keepdim=True)
    variance = ((x - mean) ** 2).mean(dims, keepdim=True)
    normed = (x - mean) / torch.sqrt(variance + module.eps)
    return normed * module.weight[:, None, None] + module.bias[:, None, None]


@pytest.mark.parametrize("kind", ["gn", "ln"])
@pytest.mark.parametrize("deploy", [False, True])
def test_block_is_the_papers_formula(kind, deploy):
    block = hard({"layers": [1], "embed_dims": [12]}, norm=kind, norm_eps=1e-3, deploy=deploy, dtype=torch.float64)
    block = block.network[0][0]
    x = images(2, 12, 5, 3, dtype=torch.float64) * 0.1 + 1
    scale_1, scale_2 = block.layer_scale_1[:, None, None], block.layer_scale_2[:, None, None]
    if deploy:
        y = x + scale_1 * manual_norm(x, block.norm_reparam, kind)
    else:
        n = manual_norm(x, block.norm1, kind)
        affine = block.token_mixer.affine
        y = x + scale_1 * (affine.weight.view(-1, 1, 1) * n + affine.bias[:, None, None] - n)
    z = manual_norm(y, block.norm2, kind)
    h = torch.einsum("oi,bihw->bohw", block.mlp.fc1.weight[:, :, 0, 0], z) + block.mlp.fc1.bias[:, None, None]
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    o = torch.einsum("oi,bihw->bohw", block.mlp.fc2.weight[:, :, 0, 0], h) + block.mlp.fc2.bias[:, None, None]
    assert relative(block(x), y + scale_2 * o) <= 1e-12


def test_the_two_norms_are_different_functions():
    outputs = [hard("s12", norm=norm, dtype=torch.float64)(images(1, 3, 64, 64, dtype=torch.float64))[0]
               for norm in ("gn", "ln")]  # fmt: skip
    assert relative(outputs[0], outputs[1]) > 0.1


def test_layer_norm_2d_keeps_the_memory_format():
    norm = riformer.LayerNorm2d(8)
    x = images(2, 8, 5, 5)
    assert norm(x).is_contiguous()
    last = norm(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1))


def test_logits_are_fc_of_the_mean_of_the_last_feature():
    model = hard(num_classes=5, out_indices=(2, -1), dtype=torch.float64)
    x = images(3, 3, 64, 40, dtype=torch.float64)
    last = model.forward_features(x)[-1]
    expected = last.flatten(2).mean(-1) @ model.head.fc.weight.T + model.head.fc.bias
    assert relative(model(x), expected) <= 1e-13
    assert model(x).shape == (3, 5)


def test_features_are_normed_and_in_network_order():
    model = hard(out_indices=[6, 0, -4])
    assert model.out_indices == (0, 3, 6)
    first, middle, last = model(images(1, 3, 64, 64))
    assert [f.shape[1] for f in (first, middle, last)] == [8, 24, 40]
    torch.testing.assert_close(first, model.norm0(model.network[0](model.patch_embed(images(1, 3, 64, 64)))))


def test_equal_widths_have_no_downsampling_between_them():
    model = RIFormer({"layers": [1, 1, 1], "embed_dims": [8, 8, 16]}, out_indices=(0, 1, 2, 3))
    assert len(model.network) == 4
    assert [tuple(f.shape[1:]) for f in model(images(1, 3, 32, 32))] == [(8, 8, 8), (8, 8, 8), (16, 4, 4), (16, 4, 4)]


def test_drop_path_drops_whole_images_in_training_only():
    from riformer.model import DropPath

    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    assert drop.eval()(x) is x
    torch.manual_seed(0)
    y = drop.train()(x)
    assert all(len(image.unique()) == 1 for image in y[:50])
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_dropout_and_drop_path_act_in_training():
    for options in ({"drop_rate": 0.5}, {"drop_path_rate": 0.5}):
        model, x = hard(**options), images(8, 3, 32, 32)
        assert torch.equal(model(x)[0], model(x)[0])
        model.train()
        assert not torch.equal(model(x)[0], model(x)[0])


def test_every_parameter_gets_a_gradient():
    model = hard(num_classes=4).train()
    model(images(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------- the fold


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("arch", ["s12", TINY], ids=["s12", "tiny"])
def test_deployed_computes_the_same(arch, norm, dtype, bound):
    model = hard(arch, norm=norm, num_classes=10, out_indices=(0, 2, 4, 6), dtype=dtype)
    x = images(1, 3, 64, 64, dtype=dtype)
    with torch.inference_mode():
        before = (*model.forward_features(x), model(x))
        assert model.switch_to_deploy() is model
        after = (*model.forward_features(x), model(x))
    for b, a in zip(before, after, strict=True):
        assert relative(a, b) <= bound
    assert not any("norm1" in name or "token_mixer" in name for name in model.state_dict())
    assert model.deploy and all(block.deploy for stage in model.network[::2] for block in stage)


def test_fold_values_by_hand():
    block = riformer.RIFormerBlock(2)
    with torch.no_grad():
        block.norm1.weight.copy_(torch.tensor([2.0, -1.0]))
        block.norm1.bias.copy_(torch.tensor([0.5, 3.0]))
        block.token_mixer.affine.weight.copy_(torch.tensor([1.25, 4.0]).view(2, 1, 1, 1))
        block.token_mixer.affine.bias.copy_(torch.tensor([-1.0, 0.125]))
    assert block.switch_to_deploy() is block
    assert block.norm_reparam.weight.tolist() == [0.5, -3.0]
    assert block.norm_reparam.bias.tolist() == [-0.875, 9.125]


def test_fold_is_rounded_once():
    """In bf16 every parameter is the rounding of the exact value, which folding in bf16 would miss."""
    model = hard("s12", dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double().switch_to_deploy().state_dict()
    found = model.switch_to_deploy().state_dict()
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in exact)


def test_deploying_twice_changes_nothing():
    model = hard().switch_to_deploy()
    modules, before = list(model.modules()), copy.deepcopy(model.state_dict())
    model.switch_to_deploy()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_fold_keeps_eps_dtype_training_flag_and_gradients():
    for norm, kind in (("gn", torch.nn.GroupNorm), ("ln", riformer.LayerNorm2d)):
        model = RIFormer(TINY, norm=norm, norm_eps=3e-4).half().train()
        first, second = model.network[2]
        for p in (*first.norm1.parameters(), *first.token_mixer.parameters()):
            p.requires_grad_(False)
        second.norm1.eval()
        model.switch_to_deploy()
        assert type(first.norm_reparam) is kind
        assert (first.norm_reparam.eps, first.norm_reparam.weight.dtype) == (3e-4, torch.float16)
        assert (first.norm_reparam.training, second.norm_reparam.training) == (True, False)
        assert not any(p.requires_grad for p in first.norm_reparam.parameters())
        assert all(p.requires_grad for p in second.norm_reparam.parameters())


def test_fold_keeps_the_device_and_the_order_of_parameters():
    switched = RIFormer(TINY, num_classes=3).to("meta").switch_to_deploy()
    assert all(p.is_meta for p in switched.parameters())
    assert list(switched.state_dict()) == list(RIFormer(TINY, num_classes=3, deploy=True).state_dict())


# -------------------------------------------------------------------------------------------------------- life in torch


@pytest.mark.parametrize("deploy", [False, True])
def test_deepcopy_and_pickle(deploy):
    model, x = hard(num_classes=3), images(1, 3, 32, 32)
    model = model.switch_to_deploy() if deploy else model
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert list(other.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_compiles_without_graph_break_and_exports(norm):
    model, x = hard(num_classes=3, norm=norm), images(2, 3, 32, 40)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(model, (x,), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(x[:1].repeat(5, 1, 1, 1)), model(x[:1].repeat(5, 1, 1, 1)))


def test_empty_batch_odd_sizes_and_low_precision():
    model = hard(num_classes=3)
    assert model(images(0, 3, 32, 32)).shape == (0, 3)
    assert model(images(1, 3, 3, 3)).shape == (1, 3)
    assert model(images(1, 3, 37, 21).to(memory_format=torch.channels_last)).shape == (1, 3)
    assert model.bfloat16()(images(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_takes_images_of_another_dtype():
    model = hard(num_classes=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images(1, 3, 32, 32)).dtype == torch.bfloat16
        assert model(images(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (images(3, 32, 32), ValueError, ["[B, 3, H, W]", "[3, 32, 32]", "unsqueeze(0)"]),
        (images(1, 1, 3, 32, 32), ValueError, ["[B, 3, H, W]", "5 dimensions"]),
        (images(1, 4, 32, 32), ValueError, ["[B, 3, H, W]", "4 channels", "in_channels=4"]),
        (images(1, 32, 32, 3), ValueError, ["32 channels", "permute(0, 3, 1, 2)"]),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, ["floating-point", "torch.uint8", ".float()"]),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), TypeError, ["floating-point", "torch.int64"]),
        (torch.zeros(1, 3, 32, 32, dtype=torch.complex64), TypeError, ["floating-point", "torch.complex64"]),
        (images(1, 3, 32, 32, dtype=torch.float64), TypeError, ["torch.float64", "torch.float32", "images.to("]),
        (images(1, 3, 2, 32), ValueError, ["at least 3", "[1, 3, 2, 32]"]),
        (images(1, 3, 32, 32).numpy(), TypeError, ["torch.Tensor", "ndarray"]),
    ],
    ids=["3d", "5d", "channels", "nhwc", "uint8", "int64", "complex", "double", "too-small", "numpy"],
)
def test_wrong_images_are_named(x, error, words):
    with pytest.raises(error) as caught:
        RIFormer(TINY)(x)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"arch": "s13"}, ValueError, ["'s13'", "s12, s24, s36, m36, m48"]),
        ({"arch": 12}, TypeError, ["int", "s12"]),
        ({"arch": {"layers": [1]}}, ValueError, ["missing ['embed_dims']"]),
        ({"arch": {"layers": [1], "embed_dims": [8], "dims": 3}}, ValueError, ["unknown ['dims']"]),
        ({"arch": {"layers": [1, 1], "embed_dims": [8]}}, ValueError, ["2 layers, 1 embed_dims"]),
        ({"arch": {"layers": [0], "embed_dims": [8]}}, ValueError, ["layers", "0"]),
        ({"arch": {"layers": [1.5], "embed_dims": [8]}}, TypeError, ["layers", "1.5"]),
        ({"arch": {"layers": 1, "embed_dims": [8]}}, TypeError, ["layers", "list"]),
        ({"arch": {"layers": [1], "embed_dims": [8], "mlp_ratios": [0.01]}}, ValueError, ["hidden"]),
        ({"norm": "bn"}, ValueError, ["'bn'", "'gn'", "'ln'"]),
        ({"norm_eps": 0.0}, ValueError, ["norm_eps", "0.0"]),
        ({"in_channels": 0}, ValueError, ["in_channels", "0"]),
        ({"num_classes": -1}, ValueError, ["num_classes", "-1"]),
        ({"num_classes": 2.0}, TypeError, ["num_classes", "2.0"]),
        ({"drop_rate": 1.0}, ValueError, ["drop_rate", "[0, 1)"]),
        ({"drop_path_rate": -0.1}, ValueError, ["drop_path_rate", "-0.1"]),
        ({"out_indices": 7}, ValueError, ["7", "-7 to 6"]),
        ({"out_indices": -8}, ValueError, ["-8", "-7 to 6"]),
        ({"out_indices": [6, -1]}, ValueError, ["at most once"]),
        ({"out_indices": []}, TypeError, ["[]"]),
        ({"out_indices": ["6"]}, TypeError, ["'6'"]),
        ({"out_indices": [0, 2], "num_classes": 3}, ValueError, ["classifier", "Add 6"]),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, error, words):
    with pytest.raises(error) as caught:
        RIFormer(**{"arch": "s12", **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_arch_names_and_round_trip():
    assert riformer.resolve_arch("S12") is riformer.resolve_arch(" s12 ")
    for name, arch in riformer.ARCHS.items():
        assert riformer.resolve_arch(arch.as_dict()) == arch and arch.name == name
    assert riformer.resolve_arch(TINY).name is None
    assert riformer.resolve_arch(TINY).hidden_dims == (32, 48, 60, 160)


@pytest.mark.parametrize(
    ("size", "count", "words"),
    [(2, "published", "found 2"), ((224,), "published", "found .224"), (224, "flops", "found 'flops'")],
)
def test_wrong_count_requests_are_named(size, count, words):
    with pytest.raises(ValueError, match=words):
        riformer.count_macs("s12", size, count=count)
