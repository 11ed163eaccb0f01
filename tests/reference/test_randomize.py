"""Hard parameters: reproducible, of the documented distribution, healthy in depth, and hard."""

from __future__ import annotations

import copy

import pytest
import torch
from riformer import RIFormer, randomize_
from support_riformer import relative

TINY = {"layers": [1, 2, 1, 1], "embed_dims": [8, 16, 24, 40], "mlp_ratios": [4, 3, 2.5, 4]}


def images(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hard(arch=TINY, seed: int = 1, dtype=torch.float32, **options) -> RIFormer:
    return randomize_(RIFormer(arch, **options), seed).eval().to(dtype)


def test_randomize_depends_on_seed_and_name_only():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = hard(seed=3, num_classes=5)
    torch.set_rng_state(state)
    other = RIFormer(TINY, num_classes=5)
    torch.manual_seed(99)
    assert randomize_(other, 3) is other
    named = other.state_dict()
    assert all(torch.equal(t, named[n]) for n, t in one.state_dict().items())
    assert not any(torch.equal(t, named[n]) for n, t in hard(seed=4, num_classes=5).state_dict().items())
    wrapped = randomize_(torch.nn.DataParallel(RIFormer(TINY)), 3)
    assert all(torch.equal(t, named[n]) for n, t in wrapped.module.state_dict().items())
    before = torch.get_rng_state()
    randomize_(other, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_randomize_gives_both_forms_the_same_function():
    x = images(1, 3, 64, 64, dtype=torch.float64)
    trained, deployed = hard(num_classes=4), hard(num_classes=4, deploy=True)
    folded = copy.deepcopy(trained).switch_to_deploy().state_dict()
    assert all(torch.equal(tensor, folded[name]) for name, tensor in deployed.state_dict().items())
    trained, deployed = (randomize_(m.double(), 1) for m in (trained, deployed))
    # A narrow training-time model folds its rounded values, so a deployed one must start from those too.
    folded = randomize_(RIFormer(TINY).bfloat16(), 1).switch_to_deploy().state_dict()
    narrow = randomize_(RIFormer(TINY, deploy=True).bfloat16(), 1).state_dict()
    assert all(torch.equal(tensor, folded[name]) for name, tensor in narrow.items())
    widened = hard(num_classes=4, dtype=torch.float64).state_dict()
    assert all(torch.equal(tensor, widened[name]) for name, tensor in trained.state_dict().items())
    assert relative(deployed(x), trained(x)) <= 1e-12


def test_randomize_has_the_documented_distribution():
    model = hard("s24")

    def values(part):
        return torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith(part)])

    expected = {"layer_scale_1": (0.5, 0.3), "layer_scale_2": (0.5, 0.3), "norm1.weight": (1, 0.25),
                "norm2.bias": (0, 0.25), "affine.weight": (1, 0.5), "affine.bias": (0, 0.25), "fc1.bias": (0, 0.5),
                "fc2.bias": (0, 0.25), "proj.bias": (0, 0.25)}  # fmt: skip
    for part, (mean, std) in expected.items():
        assert values(part).mean().item() == pytest.approx(mean, abs=0.03), part
        assert values(part).std().item() == pytest.approx(std, rel=0.05), part
    assert model.network[4][0].mlp.fc2.weight.std().item() == pytest.approx(1.5 / 1280**0.5, rel=0.02)


@pytest.mark.parametrize("arch", ["s12", "m48"])
def test_randomized_activations_stay_healthy(arch):
    model = hard(arch)
    sizes = []
    for position in model.network:
        position.register_forward_hook(lambda _m, _i, out: sizes.append((out.std().item(), out.abs().max().item())))
    with torch.inference_mode():
        model(images(1, 3, 64, 64))
    assert len(sizes) == 7
    assert all(0.3 < std < 10 and largest < 60 for std, largest in sizes), sizes


def test_hard_parameters_show_a_missing_block_and_fresh_ones_do_not():
    x = images(1, 3, 64, 64, dtype=torch.float64)
    changes = []
    for model in (RIFormer("s12").eval().double(), hard("s12", dtype=torch.float64)):
        whole = model(x)[0]
        model.network[4][3] = torch.nn.Identity()
        changes.append(relative(model(x)[0], whole))
    assert changes[0] < 1e-3 and changes[1] > 0.05, changes


def test_randomize_refuses_other_models():
    with pytest.raises(ValueError, match=r"'0.weight'"):
        randomize_(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="dict"):
        randomize_({})
