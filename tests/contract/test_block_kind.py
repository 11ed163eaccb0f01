"""The table of block kinds: that it fits the op, and that one entry more is all that another kind of block needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from riformer.model import RIFormer
from support_compare import close
from torch import nn

from riformer_kernels import PatchError, block_kind, patch
from riformer_kernels.block_kind import DEPLOYED, TRAINING, BlockKind, kind_of, tensor_paths
from riformer_kernels.ops.block import BlockParameters

POOLING = BlockKind("pooling", mixer=("norm1", "token_mixer"), affine=None, fuses_first_half=False)


class Pooling(nn.Module):
    """PoolFormer's token mixer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False) - x


def blocks_of(model: RIFormer) -> list[nn.Module]:
    return [block for stage in model.network if isinstance(stage, nn.Sequential) for block in stage]


@pytest.fixture
def pooling(make, monkeypatch):
    """Builds a model whose token mixers pool, with the kind of its blocks in the table."""

    def build(**options) -> RIFormer:
        monkeypatch.setattr(block_kind, "KINDS", (*block_kind.KINDS, POOLING))
        return without_entry(make, **options)

    return build


def without_entry(make, **options) -> RIFormer:
    model = make(deploy=False, **options)
    for block in blocks_of(model):
        block.token_mixer = Pooling()
    return model


@pytest.mark.parametrize("kind", [DEPLOYED, TRAINING, POOLING], ids=lambda kind: kind.name)
def test_every_tensor_of_the_op_has_a_path(kind):
    settings = {"eps1", "eps2", "per_position", "residual"}
    assert set(tensor_paths(kind)) == set(BlockParameters._fields) - settings


def test_blocks_are_told_apart(make):
    assert kind_of(make(deploy=True).network[0][0]) is DEPLOYED
    assert kind_of(make(deploy=False).network[0][0]) is TRAINING
    assert kind_of(without_entry(make).network[0][0]) is None and kind_of(None) is None


def test_without_an_entry_the_block_is_refused(make, backend):
    with pytest.raises(PatchError, match="its token mixer is Pooling"):
        patch(without_entry(make), backend=backend)


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
