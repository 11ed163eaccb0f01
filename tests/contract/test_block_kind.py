"""The table of block kinds: that it fits the op, and that one entry more is all that another kind of block needs."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from riformer.model import RIFormer, RIFormerBlock
from support_compare import close
from torch import nn

from riformer_kernels import PatchError, block_kind, patch, recognise
from riformer_kernels.block_kind import DEPLOYED, TRAINING, BlockKind, kind_of, ordered, tensor_paths
from riformer_kernels.ops.block import BlockParameters

POOLING = BlockKind("pooling", mixer=("norm1", "token_mixer"), affine=None, fuses_first_half=False)
SCALED = dataclasses.replace(
    TRAINING, name="scaled", layer_scale_1="layer_scale1.scale", layer_scale_2="layer_scale2.scale"
)


class Pooling(nn.Module):
    """PoolFormer's token mixer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False) - x


def blocks_of(model: RIFormer) -> list[nn.Module]:
    return [block for stage in model.network if isinstance(stage, nn.Sequential) for block in stage]


@pytest.fixture
def pooling(make, monkeypatch):
    """Builds a model whose token mixers pool, with the kind of its blocks in the table."""
    monkeypatch.setattr(block_kind, "KINDS", (*block_kind.KINDS, POOLING))
    return functools.partial(without_entry, make)


def without_entry(make, **options) -> RIFormer:
    model = make(deploy=False, **options)
    for block in blocks_of(model):
        block.token_mixer = Pooling()
    return model


class Scale(nn.Module):
    """A layer scale as a module of its own, as timm has it."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale[:, None, None] * x


class ScaledBlock(RIFormerBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.layer_scale1(self.token_mixer(self.norm1(x))))
        return x + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))


@pytest.fixture
def scaled(make, monkeypatch):
    """Builds a model whose layer scales are modules, with the kind of its blocks in the table."""
    monkeypatch.setattr(block_kind, "KINDS", ordered(*block_kind.KINDS, SCALED))

    def build(**options) -> RIFormer:
        model = make(deploy=False, **options)
        for block in blocks_of(model):
            block.__class__ = ScaledBlock
            block.layer_scale1, block.layer_scale2 = Scale(block.layer_scale_1.data), Scale(block.layer_scale_2.data)
            del block.layer_scale_1, block.layer_scale_2
        return model

    return build


@pytest.mark.parametrize("kind", [DEPLOYED, TRAINING, POOLING, SCALED], ids=lambda kind: kind.name)
def test_every_tensor_of_the_op_has_a_path(kind):
    settings = {"eps1", "eps2", "per_position", "residual", "int8"}
    assert set(tensor_paths(kind)) == set(BlockParameters._fields) - settings


def test_blocks_are_told_apart(make):
    assert kind_of(make(deploy=True).network[0][0]) is DEPLOYED
    assert kind_of(make(deploy=False).network[0][0]) is TRAINING
    assert kind_of(without_entry(make).network[0][0]) is None and kind_of(None) is None


def test_without_an_entry_the_block_is_refused(make, backend):
    with pytest.raises(PatchError, match="its token mixer is Pooling"):
        patch(without_entry(make), backend=backend)


def test_the_refusal_names_what_every_kind_has(make, monkeypatch):
    wanted = "norm_reparam, or norm1 with token_mixer.affine"
    expected = f"none of its 8 blocks has RIFormer's {wanted} (its token mixer is Pooling)"
    assert recognise.why_not_backbone(without_entry(make)) == expected
    monkeypatch.setattr(block_kind, "KINDS", (*block_kind.KINDS, POOLING))
    assert block_kind.expected_mixers() == f"{wanted}, or norm1 with token_mixer"


def test_a_kind_before_one_that_asks_for_more_is_refused():
    """It would take the blocks of that one: a pooling kind those of RIFormer while training."""
    assert ordered(DEPLOYED, TRAINING, POOLING) == (DEPLOYED, TRAINING, POOLING)
    with pytest.raises(ValueError, match="'pooling' recognises every block of 'training'"):
        ordered(DEPLOYED, POOLING, TRAINING)
    with pytest.raises(ValueError, match="'training' recognises every block of 'twice'"):
        ordered(TRAINING, dataclasses.replace(TRAINING, name="twice"))


@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_one_entry_fuses_the_second_half_of_another_block(pooling, images, backend, count_ops, norm):
    model = pooling(num_classes=10, norm=norm)
    with torch.inference_mode():
        expected, found = model(images), []
        handle = patch(model, backend=backend)
        assert handle.verification[""].passed and len(handle.verification[""].branches) == 8
        assert count_ops(lambda: found.append(model(images)))["block_"] == 8
        assert close(found[0], expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(images).dtype == torch.bfloat16


def test_the_other_block_is_probed(pooling, backend):
    class Louder(type(blocks_of(pooling())[0])):
        def forward(self, x):
            return 2 * super().forward(x)

    model = pooling()
    model.network[0][0].__class__ = Louder
    with pytest.raises(PatchError, match="forward of Louder"):
        patch(model, backend=backend)


def test_the_other_block_is_traced(pooling, images, backend):
    model = pooling(num_classes=10)
    with torch.no_grad():
        expected = model(images)
        patch(model, backend=backend)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert close(compiled(images), expected)


def test_the_report_says_that_half_of_the_block_is_not_fused(pooling, make, backend):
    """It is no reason to refuse the block: ``strict`` lets it pass."""
    stages = [row for row in patch(pooling(), backend=backend, strict=True).report if row.kind == "stage"]
    assert {row.reason for row in stages} == {"blocks 0, 1: first half runs its own modules (pooling)"}
    assert all(row.fused == row.total == 2 for row in stages)
    for deploy in (True, False):
        assert {row.reason for row in patch(make(deploy=deploy), backend=backend).report} == {None}


@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_a_layer_scale_may_lie_in_a_module(scaled, images, backend, count_ops, norm):
    model = scaled(num_classes=10, norm=norm)
    blocks = blocks_of(model)
    with torch.inference_mode():
        expected, found = model(images), []
        handle = patch(model, backend=backend)
        assert handle.verification[""].passed and handle.report[1].reason is None
        assert count_ops(lambda: found.append(model(images)))["block_"] == len(blocks) == 8
        assert close(found[0], expected)
        blocks[0].layer_scale2.scale.mul_(3)
        found.append(model(images))
        handle.restore()
        assert close(found[1], model(images)) and not close(found[1], expected)


def test_a_layer_scale_in_a_module_is_traced(scaled, images, backend):
    model = scaled(num_classes=10)
    with torch.no_grad():
        expected = model(images)
        patch(model, backend=backend)
        assert close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected)


def test_a_layer_scale_in_a_module_is_a_parameter_of_the_right_shape(scaled, backend):
    for value in (torch.ones(16), nn.Parameter(torch.ones(1))):
        model = scaled()
        scale = blocks_of(model)[0].layer_scale1
        del scale.scale
        scale.scale = value
        with pytest.raises(PatchError, match=r"layer_scale1\.scale is not a parameter of shape \[16\]"):
            patch(model, backend=backend)
