"""Paths of the CUDA kernels that no case of the conformance suite takes, on the emulator."""

from __future__ import annotations

import pytest
import torch
from support_block import Block, check_block
from support_emulated import EMULATED, OPS, OTHERS, emulated


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("channels", [16, 64, 96, 128, 192, 320, 384, 512, 768])
def test_block_where_shared_memory_is_less(architecture, processors, channels):
    with emulated(architecture, processors):
        for dtype in (torch.float32, torch.bfloat16):
            check_block(EMULATED.block, Block(channels, (7, 5), dtype, batch=2, hidden=64, layout="channels_last"))


def test_embed_without_moments():
    out, found = OPS.embed(torch.ones(2, 3, 9, 8), torch.ones(8, 3, 3, 3), None, 2, 1, torch.float32, False)
    assert found.shape == (2, 2, 0) and (out[:, :, 1, 1] == 27).all()
