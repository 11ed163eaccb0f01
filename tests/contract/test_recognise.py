"""What can be fused, and the reason when it cannot: one row per reason."""

from __future__ import annotations

import copy

import pytest
import torch
from riformer.model import Affine, Mlp, RIFormer, RIFormerBlock
from torch import nn
from torch.nn.utils import parametrizations, prune

from riformer_kernels import plan, probe, recognise
from riformer_kernels.block_kind import DEPLOYED


def reasons(model: nn.Module, multiple: int = 8) -> dict[str, str]:
    found = recognise.describe(model, multiple)
    return found.refuse(probe.refusals(model, found)).reasons()


def test_a_healthy_model_has_no_reason(make):
    for norm in ("gn", "ln"):
        for deploy in (False, True):
            assert reasons(make(norm=norm, deploy=deploy, num_classes=4, out_indices=(0, 6))) == {}


def test_the_plan_is_what_the_model_is(make):
    model = make(num_classes=4, deploy=True, norm="ln", norm_eps=1e-6)
    found = recognise.describe(model)
    assert found.stem == plan.EmbedPlan("patch_embed", "stem", 3, 16, (7, 7), 4, 2, None)
    assert found.network[1] == plan.EmbedPlan("network.1", "downsample", 16, 32, (3, 3), 2, 1, None)
    assert found.network[2].blocks[1] == plan.BlockPlan("network.2.1", DEPLOYED, 32, 128, True, 1e-6, 1e-6, None)
    assert found.norms == (plan.NormPlan("norm6", 6, 64, True, 1e-6, None),)
    assert found.head == plan.HeadPlan("head", 64, 4, None)
    assert not recognise.describe(make()).network[0].blocks[0].per_position


def _set(path: str, value):
    def change(model: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner) if owner else model
        setattr(
            module,
            name,
            value(getattr(module, name)) if callable(value) and not isinstance(value, nn.Module) else value,
        )

    return change


class Scaled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(RIFormerBlock):
    def forward(self, x):
        return x + super().forward(x)


class Squared(Mlp):
    def forward(self, x):
        return super().forward(x) ** 2


class NoMinus(Affine):
    def forward(self, x):
        return self.affine(x)


def _class(path: str, cls: type):
    def change(model: nn.Module) -> None:
        model.get_submodule(path).__class__ = cls

    return change


BLOCK = "network.2.1"
TABLE = [
    (_set(f"{BLOCK}.norm2", nn.BatchNorm2d(32)), BLOCK, "norm2 is BatchNorm2d"),
    (_set(f"{BLOCK}.norm2", nn.BatchNorm2d(32).eval().requires_grad_(False)), BLOCK, "norm2 is BatchNorm2d"),
    (_set(f"{BLOCK}.norm1", nn.SyncBatchNorm(32)), BLOCK, "norm1 is SyncBatchNorm"),
    (_set(f"{BLOCK}.norm1", nn.GroupNorm(2, 32)), BLOCK, "GroupNorm with 2 groups, expected 1"),
    (_set(f"{BLOCK}.norm1", nn.GroupNorm(1, 32, affine=False)), BLOCK, "norm1 has no affine weight and bias"),
    (_set(f"{BLOCK}.norm2", nn.LayerNorm(32)), BLOCK, "norm2 is a plain nn.LayerNorm"),
    (_set(f"{BLOCK}.norm2", nn.InstanceNorm2d(32)), BLOCK, "norm2 is InstanceNorm2d"),
    (_class(f"{BLOCK}.norm2", Scaled), BLOCK, "does not compute a RIFormer block"),
    (_set(f"{BLOCK}.mlp.act", nn.ReLU()), BLOCK, "mlp.act is ReLU"),
    (_set(f"{BLOCK}.mlp.act", nn.GELU(approximate="tanh")), BLOCK, "approximate='tanh'"),
    (_set(f"{BLOCK}.mlp.fc1", nn.Conv2d(32, 128, 3, padding=1)), BLOCK, "mlp.fc1 has kernel_size (3, 3)"),
    (_set(f"{BLOCK}.mlp.fc1", nn.Conv2d(32, 128, 1, groups=2)), BLOCK, "mlp.fc1 has groups 2"),
    (_set(f"{BLOCK}.mlp.fc2", nn.Conv2d(128, 32, 1, stride=2)), BLOCK, "mlp.fc2 has stride (2, 2)"),
    (_set(f"{BLOCK}.mlp.fc2", nn.Conv2d(128, 32, 1, padding=1)), BLOCK, "mlp.fc2 has padding (1, 1)"),
    (_set(f"{BLOCK}.mlp.fc1", nn.Linear(32, 128)), BLOCK, "mlp.fc1 is Linear, not nn.Conv2d"),
    (_set(f"{BLOCK}.mlp.fc2", nn.Conv2d(128, 16, 1)), BLOCK, "mlp.fc2 maps 128 to 16"),
    (lambda m: parametrizations.weight_norm(m.get_submodule(f"{BLOCK}.mlp.fc1")), BLOCK, "mlp.fc1 is parametrized"),
    (lambda m: prune.random_unstructured(m.get_submodule(f"{BLOCK}.mlp.fc1"), "weight", 0.5), BLOCK,
     "forward pre-hook on mlp.fc1"),
    (_set(f"{BLOCK}.mlp.forward", lambda f: lambda x: f(x)), BLOCK, "forward of mlp was replaced on the instance"),
    (_set(f"{BLOCK}.forward", lambda f: lambda x: f(x)), BLOCK, "forward of the module itself was replaced"),
    (_class(BLOCK, Doubled), BLOCK, "forward of Doubled"),
    (_class(f"{BLOCK}.mlp", Squared), BLOCK, "does not compute a RIFormer block"),
    (_class(f"{BLOCK}.token_mixer", NoMinus), BLOCK, "does not compute a RIFormer block"),
    (_set(f"{BLOCK}.token_mixer.affine", nn.Conv2d(32, 32, 1)), BLOCK, "token_mixer.affine has groups 1, expected 32"),
    (lambda m: m.get_submodule(BLOCK).add_module("se", nn.Identity()), BLOCK,
     "children that a RIFormer block does not have: se"),
    (lambda m: m.get_submodule(BLOCK).mlp.add_module("dwconv", nn.Identity()), BLOCK, "mlp.dwconv"),
    (_set(f"{BLOCK}.layer_scale_1", nn.Parameter(torch.ones(1))), BLOCK,
     "layer_scale_1 is not a parameter of shape [32]"),
    (_set("network.3.proj", nn.Conv2d(32, 48, 3, 2, 1, dilation=2)), "network.3", "dilation (2, 2)"),
    (_set("network.3.proj", nn.Conv2d(32, 48, 3, 2, 1, groups=2)), "network.3", "groups 2"),
    (_set("network.3.proj", nn.Conv2d(32, 48, 3, (2, 1), 1)), "network.3", "expected square ones"),
    (_set("network.3.proj", nn.Conv2d(32, 48, 3, 1, "same")), "network.3", "expected square ones"),
    (_set("patch_embed.proj", nn.Conv2d(3, 16, 7, 4, 2, padding_mode="reflect")), "patch_embed",
     "padding_mode 'reflect'"),
    (lambda m: m.patch_embed.add_module("norm", nn.BatchNorm2d(16)), "patch_embed", "norm is BatchNorm2d"),
    (lambda m: m.network[3].register_forward_hook(print), "network.3", "forward hook on the module itself"),
    (lambda m: m.network[2].register_forward_hook(print), BLOCK, "forward hook on the stage"),
    (_class("norm6", Scaled), "norm6", "forward of Scaled does not compute GroupNorm(1)"),
    (_set("head.fc", nn.Sequential(nn.Linear(64, 4))), "head", "without a Linear 'fc'"),
    (lambda m: m.head.add_module("drop", nn.Dropout()), "head", "head has more than 'fc'"),
    (lambda m: m.head.fc.register_forward_hook(print), "head", "forward hook on fc"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "part", "message"), TABLE, ids=[f"{i}-{row[2]}" for i, row in enumerate(TABLE)])
def test_reason(make, change, part, message):
    model = make(num_classes=4)
    change(model)
    found = reasons(model)
    assert message in found.get(part, f"no reason for {part}: {found}")
    others = {name for name in found if name != part and not name.startswith("network.2.")}
    assert others <= ({"head"} if part == "norm6" else set()), "nothing else is held back"


@pytest.mark.parametrize(
    "path", ["", "mlp", "mlp.fc1", "mlp.act", "mlp.drop", "norm2", "drop_path", "token_mixer.affine"]
)
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_every_hook_on_every_inner_module(make, path, register):
    model = make()
    block = model.get_submodule(BLOCK)
    getattr(block.get_submodule(path), register)(lambda *args: None)
    assert set(reasons(model)) == {BLOCK} and "hook on " + (path or "the module itself") in reasons(model)[BLOCK]


@pytest.mark.parametrize("option", ["drop_rate", "drop_path_rate"])
def test_dropout_matters_only_in_training(make, option):
    model = make(**{option: 0.2})
    assert reasons(model) == {}
    model.train()
    found = reasons(model)
    assert found and all("active while training" in reason and "eval()" in reason for reason in found.values())


def test_widths_of_the_native_kernels(make):
    model = make(arch={"layers": [1, 1], "embed_dims": [12, 16]})
    found = reasons(model)
    assert (
        "12 channels: the native kernels need a multiple of 8" in found["network.0.0"]
        and "reference" in found["patch_embed"]
    )
    assert reasons(model, multiple=1) == {}
    model = make(arch={"layers": [1], "embed_dims": [16], "mlp_ratios": [0.75]})
    assert "12 hidden channels" in reasons(model)["network.0.0"]


def test_wrong_eps_shows(make):
    """The probe sees an eps that the module does not use."""
    model = make()

    class Lying(nn.GroupNorm):
        def forward(self, x):
            return nn.functional.group_norm(x, 1, self.weight, self.bias, 1e-3)

    model.norm6.__class__ = Lying
    assert "norm6" in reasons(model)


def test_finding(make):
    model = make()
    assert recognise.find(model) == [("", model)]
    compiled = torch.compile(model)
    assert recognise.find(compiled) == [("_orig_mod", model)], "the wrapper answers for its module's attributes"
    twice = nn.ModuleList([model, nn.Sequential(model)])
    assert [name for name, _ in recognise.find(twice)] == ["0"]
    assert recognise.find(nn.DataParallel(model)) == [("module", model)]


def test_probing_leaves_no_trace(make):
    model = make(num_classes=3)
    state, versions = copy.deepcopy(model.state_dict()), [p._version for p in model.parameters()]
    before = torch.get_rng_state()
    probe._answers.clear()
    assert reasons(model) == {}
    assert torch.equal(torch.get_rng_state(), before) and [p._version for p in model.parameters()] == versions
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and type(model) is RIFormer
