"""A compact pass over every op, instruction set and dtype: ragged shapes, odd strides, empty batches, in place.

Part of the normal suite, and what `make sanitize` runs on a library built with AddressSanitizer and
UndefinedBehaviorSanitizer. They abort the process at a bad access; the same checks as elsewhere judge the numbers.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support_block import PARAMETERS, Block, block_parameters, check_block
from support_cases import LAYOUTS, lay_out, per_dtype, per_norm, tokens
from support_cpu import CPU, ISAS, OPS, per_isa
from support_embed import Embed, check_embed, embed_parameters
from support_head import check_head
from support_int8 import check_int8
from support_moments import check_moments
from support_norm import check_norm

from riformer_kernels.backends import cpu
from riformer_kernels.machine import threads

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_library_under_test_is_the_sanitized_one():
    """`make sanitize` preloads the sanitizers' runtimes: then the library must be one that uses them, not another copy
    of the package that came first on the path."""
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("no sanitizer is preloaded: the normal library, see `make sanitize`")
    assert b"__asan_report" in cpu.LIBRARY.read_bytes(), f"{cpu.LIBRARY} is not a sanitized build"
    assert b"__ubsan_handle" in cpu.LIBRARY.read_bytes()
    assert str(cpu.LIBRARY) in Path("/proc/self/maps").read_text() and ISAS


# Around every edge: one position, less than a vector, tiles of 16 and 64, more than one task, hidden chunks of 256.
BLOCKS = [
    Block(8, (1, 1), hidden=8, batch=5),
    Block(24, (5, 5), hidden=264, form="deployed", layout="strided"),
    Block(16, (17, 20), layout="channels_last", form="unit", residual=False),
    Block(40, (9, 7), hidden=24, layout="offset", residual=False),
    Block(96, (7, 7), layout="sliced", batch=2),
    Block(8, (33, 41), hidden=16, batch=2, layout="expanded", form="deployed"),
]


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_block(isa, dtype, norm, case):
    check_block(CPU.block, replace(case, dtype=dtype, norm=norm), isa)


@per_isa
@per_norm
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_int8_block(isa, norm, case):
    check_int8(CPU.block, replace(case, norm=norm, int8=True), isa)


@per_isa
@per_dtype
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_every_dtype(isa, dtype, parameters):
    check_block(CPU.block, Block(24, (9, 7), dtype, parameters=parameters, hidden=72, residual=False), isa)
    check_embed(CPU.embed, Embed(5, 24, dtype=dtype, parameters=parameters, images=parameters), isa)


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_in_place(isa, dtype, norm, layout):
    case = Block(24, (9, 7), dtype, norm)
    x, parameters = lay_out(tokens(case, 0, 24), layout), block_parameters(case, 0)
    out, out_moments = CPU.block(x, parameters)
    moments = None if norm == "ln" else OPS.moments(x)
    OPS.block_(x, moments, *(parameters[name] for name in PARAMETERS))
    assert torch.equal(x, out) and (moments is None or torch.equal(moments, out_moments))


STEM = {"kernel": (7, 7), "stride": 4, "padding": 2}
EMBEDS = [
    Embed(3, 16, size=(33, 41), **STEM),
    Embed(3, 64, size=(3, 3), batch=5, **STEM),
    Embed(4, 20, size=(30, 18), layout="sliced", weight_layout="channels_last", bias=False, **STEM),
    Embed(1, 8, size=(9, 70), layout="strided", batch=1, **STEM),
    Embed(8, 24, size=(17, 20), layout="channels_last", weight_layout="channels_last"),
    Embed(15, 7, size=(5, 4), layout="offset", weight_layout="channels_last"),
    Embed(24, 40, size=(14, 14), layout="expanded", weight_layout="strided"),
    Embed(2, 9, (1, 1), 5, 0, size=(11, 6), layout="transposed"),
    Embed(3, 1, (2, 5), 3, 3, size=(4, 9)),
]


@per_isa
@per_dtype
@pytest.mark.parametrize("case", EMBEDS, ids=str)
def test_embed(isa, dtype, case):
    check_embed(CPU.embed, replace(case, dtype=dtype), isa)


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize(("channels", "size"), [(8, (1, 1)), (12, (5, 5)), (24, (17, 20)), (20, (9, 7))], ids=str)
def test_norm_and_moments(isa, dtype, norm, channels, size):
    for layout in ("nchw", "channels_last", "offset"):
        case = Block(channels, size, dtype, norm, layout=layout)
        check_norm(CPU.norm, case, isa)
        x = tokens(case, 0, channels)
        check_moments(OPS.moments(x), x, f"{isa} {case}")


@per_isa
@per_dtype
@per_norm
def test_head(isa, dtype, norm):
    for channels, classes, batch in ((8, 40, 12), (20, 33, 53), (24, 41, 13)):
        check_head(CPU.head, Block(channels, (5, 5), dtype, norm, batch=batch, layout="strided"), classes, isa)


@per_isa
@per_dtype
@per_norm
def test_empty_batch(isa, dtype, norm):
    case = Block(16, (7, 5), dtype, norm, batch=0)
    out, moments = CPU.block(tokens(case, 0, 16), block_parameters(case, 0))
    assert out.shape == (0, 16, 7, 5) and moments.shape[0] == 0
    case = Embed(3, 16, dtype=dtype, batch=0)
    assert CPU.embed(tokens(case, 0, 3), embed_parameters(case, 0), dtype)[0].shape == (0, 16, 9, 10)


@per_isa
@per_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_overflow(isa, dtype, value):
    """Undefined conversions, out of what a comparison with NaN lets through."""
    for norm in ("gn", "ln"):
        case = Block(16, (9, 7), dtype, norm)
        x, parameters = tokens(case, 0, 16), block_parameters(case, 0)
        clean = CPU.block(x, parameters)[0]
        x[1, 3, 4, 4] = value
        found = CPU.block(x, parameters)[0]
        assert torch.equal(found[[0, 2]], clean[[0, 2]])
        large = parameters | {"fc1_weight": parameters["fc1_weight"] * 1e3, "fc1_bias": parameters["fc1_bias"] * 1e3}
        assert CPU.block(x[:1], large)[0].isfinite().all() or dtype == torch.float16


@per_isa
@per_dtype
def test_threads(isa, dtype):
    """The threads share the tokens of the larger image, and the channels of the smaller ones."""
    block, small, embed = Block(24, (17, 20), dtype), Block(24, (7, 7), dtype, batch=2), Embed(96, 40, size=(14, 14))
    calls = [partial(CPU.block, tokens(case, 0, 24), block_parameters(case, 0)) for case in (block, small)]
    case = replace(embed, dtype=dtype, batch=1)
    calls.append(partial(CPU.embed, tokens(case, 0, 96), embed_parameters(case, 0), dtype))
    for call in calls:
        expected = call()
        for count in (2, 4):
            with threads(count):
                for found, wanted in zip(call(), expected, strict=True):
                    assert torch.equal(found, wanted)
