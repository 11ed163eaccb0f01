"""The last tokens of an image where they would leave a vector nearly empty: csrc/cpu/rests.h.

Numbers of positions around whole vectors and whole tiles, on every instruction set of this machine.
"""

from __future__ import annotations

import pytest
import torch
from support_block import Block, block_parameters, check_block
from support_cases import per_dtype, per_norm, tokens
from support_cpu import CPU, per_isa
from support_embed import DOWNSAMPLE, Embed, check_embed, embed_parameters

from riformer_kernels.machine import threads

# A vector has 16, 8 or 4 tokens, a tile 16 or, above 256 positions, 64. So these leave 0 to 5 tokens behind the last
# vector, alone or behind one, three and sixteen of them.
POSITIONS = (1, 2, 3, 4, 5, 9, 12, 17, 18, 19, 20, 21, 49, 51, 64, 196, 257, 258, 323, 324)


@per_isa
@per_dtype
@pytest.mark.parametrize("positions", POSITIONS)
def test_block(isa, dtype, positions):
    check_block(CPU.block, Block(24, (positions, 1), dtype, hidden=72), isa)


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize(("channels", "hidden"), [(8, 8), (40, 264), (96, 1000)])
@pytest.mark.parametrize("positions", [2, 50, 68])
def test_block_of_any_width(isa, dtype, norm, channels, hidden, positions):
    """Widths that fill no vector along k, one vector and a part, and several chunks of hidden channels."""
    check_block(CPU.block, Block(channels, (positions, 1), dtype, norm, hidden=hidden, batch=5), isa)


@per_isa
@per_dtype
@pytest.mark.parametrize("positions", POSITIONS)
def test_embed(isa, dtype, positions):
    check_embed(CPU.embed, Embed(16, 24, size=(2 * positions - 1, 1), dtype=dtype, **DOWNSAMPLE), isa)


@per_isa
@per_dtype
@pytest.mark.parametrize("weight_layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("in_channels", "channels"), [(3, 20), (40, 56), (96, 40)])
def test_embed_of_any_width(isa, dtype, weight_layout, in_channels, channels):
    """49 positions, with one chunk of input channels and with several."""
    case = Embed(in_channels, channels, size=(14, 13), dtype=dtype, weight_layout=weight_layout, **DOWNSAMPLE)
    check_embed(CPU.embed, case, isa)


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("positions", [1, 4, 18, 49, 68, 258])
def test_a_block_gives_the_same_bits_in_any_batch_and_with_any_threads(isa, dtype, norm, positions):
    """In a batch the rests of several images share a panel; with threads they may belong to others than before."""
    case = Block(40, (positions, 1), dtype, norm, batch=9, hidden=168)
    x, parameters = tokens(case, 0, 40), block_parameters(case, 0)
    with threads(1):
        alone = [CPU.block(image[None], parameters) for image in x]
    for count in (1, 2, 3):
        with threads(count):
            for first, last in ((0, 1), (1, 4), (0, 9)):
                found = CPU.block(x[first:last], parameters)
                for i in range(first, last):
                    for mine, wanted in zip(found, alone[i], strict=True):
                        assert torch.equal(mine[i - first], wanted[0]), f"{isa} {case}: image {i}, {count} threads"


@per_isa
@per_dtype
@pytest.mark.parametrize("weight_layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("in_channels", "channels", "size"), [(3, 20, (14, 14)), (96, 40, (14, 14)), (64, 24, (6, 6))])
def test_a_convolution_gives_the_same_bits_in_any_batch_and_with_any_threads(
    isa, dtype, weight_layout, in_channels, channels, size
):
    """Few positions and several chunks of input channels: several threads share the channels (embed_split.h)."""
    case = Embed(in_channels, channels, size=size, dtype=dtype, weight_layout=weight_layout, batch=7, **DOWNSAMPLE)
    x, parameters = tokens(case, 0, in_channels), embed_parameters(case, 0)
    with threads(1):
        alone = [CPU.embed(image[None], parameters, dtype) for image in x]
    for count in (1, 2, 3):
        with threads(count):
            for first, last in ((0, 1), (1, 3), (0, 7)):
                found = CPU.embed(x[first:last], parameters, dtype)
                for i in range(first, last):
                    for mine, wanted in zip(found, alone[i], strict=True):
                        assert torch.equal(mine[i - first], wanted[0]), f"{isa} {case}: image {i}, {count} threads"
