"""Bad arguments of the ops: an error that names what was found and what was expected, and nothing is broken by it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support_block import PARAMETERS, Block, block_parameters
from support_cases import tokens
from support_cpu import bindings

OPS = bindings()
CASE = Block(16, (5, 7), hidden=24)
X = tokens(CASE, 0, 16)
MOMENTS = OPS.moments(X)
GOOD = block_parameters(CASE, 0)
DEPLOYED = block_parameters(Block(16, (5, 7), hidden=24, form="deployed"), 0)
ones = torch.ones
GOOD_RESULT = OPS.block(X, MOMENTS, *(GOOD[name] for name in PARAMETERS))[0]


def call_block(x=X, moments=MOMENTS, op="block", **changed):
    parameters = GOOD | changed
    if op == "block_":
        return OPS.block_(x.clone(), moments, *(parameters[name] for name in PARAMETERS))
    return OPS.block(x, moments, *(parameters[name] for name in PARAMETERS))


BLOCK = [
    ({"x": X[0]}, r"x has shape \[16, 5, 7\], expected \[B, C, H, W\]"),
    ({"x": X[None]}, r"x has shape \[1, 3, 16, 5, 7\], expected \[B, C, H, W\]"),
    ({"x": X.double()}, "x has dtype Double, expected Float, BFloat16 or Half; convert it first"),
    ({"x": X.int()}, "x has dtype Int, expected Float, BFloat16 or Half"),
    ({"x": X.bool()}, "x has dtype Bool, expected"),
    ({"x": X.to(torch.complex64)}, "x has dtype ComplexFloat, expected"),
    ({"x": X[:, :12]}, "12 channels and 24 hidden channels, expected multiples of 8; use backend='reference'"),
    ({"x": X[:, :0]}, "0 channels and 24 hidden channels, expected multiples of 8"),
    ({"x": X[:, :8]}, "layer_scale_1 has 16 elements, expected 8"),
    ({"x": X[:2]}, r"moments have shape \[3, 2, 16\], expected \[2, 2, 16\]"),
    ({"moments": None}, "moments are missing; GroupNorm takes its statistics from them"),
    ({"moments": MOMENTS[:, :, :8]}, r"moments have shape \[3, 2, 8\], expected \[3, 2, 16\]"),
    ({"moments": MOMENTS[:, :1]}, r"moments have shape \[3, 1, 16\], expected \[3, 2, 16\]"),
    ({"moments": MOMENTS[0]}, r"moments have shape \[2, 16\], expected \[3, 2, 16\]"),
    ({"moments": MOMENTS.double()}, "moments have dtype Double, expected Float"),
    ({"moments": MOMENTS.bfloat16()}, "moments have dtype BFloat16, expected Float"),
    ({"layer_scale_1": None}, "layer_scale_1, norm1_weight and norm1_bias go together: give all three or none"),
    ({"norm1_bias": None}, "layer_scale_1, norm1_weight and norm1_bias go together"),
    ({"norm1_weight": None}, "layer_scale_1, norm1_weight and norm1_bias go together"),
    ({"norm1_weight": None, "layer_scale_1": None}, "go together"),
    ({"norm1_weight": None, "norm1_bias": None, "layer_scale_1": None}, "affine_weight needs norm1_weight"),
    ({"affine_weight": None}, "affine_bias needs affine_weight"),
    ({"layer_scale_1": ones(15)}, "layer_scale_1 has 15 elements, expected 16"),
    ({"layer_scale_1": ones(())}, "layer_scale_1 has 1 elements, expected 16"),
    ({"norm1_weight": ones(17)}, "norm1_weight has 17 elements, expected 16"),
    ({"norm1_bias": ones(0)}, "norm1_bias has 0 elements, expected 16"),
    ({"affine_weight": ones(16, 2)}, "affine_weight has 32 elements, expected 16"),
    ({"affine_bias": ones(8)}, "affine_bias has 8 elements, expected 16"),
    ({"norm2_weight": ones(8)}, "norm2_weight has 8 elements, expected 16"),
    ({"norm2_bias": ones(8)}, "norm2_bias has 8 elements, expected 16"),
    ({"norm2_bias": ones(16).double()}, "norm2_bias has dtype Double, expected Float, BFloat16 or Half"),
    ({"norm2_weight": ones(16).long()}, "norm2_weight has dtype Long, expected"),
    ({"fc1_weight": ones(20, 16)}, "16 channels and 20 hidden channels, expected multiples of 8"),
    ({"fc1_weight": ones(0, 16)}, "16 channels and 0 hidden channels, expected multiples of 8"),
    ({"fc1_weight": ones(())}, "16 channels and 0 hidden channels, expected multiples of 8"),
    ({"fc1_weight": ones(24, 8)}, r"fc1_weight has shape \[24, 8\], expected \[24, 16\]"),
    ({"fc1_weight": ones(24, 16, 3, 3)}, r"fc1_weight has shape \[24, 16, 3, 3\], expected \[24, 16\]"),
    ({"fc1_weight": ones(24, 16, 1)}, r"fc1_weight has shape \[24, 16, 1\], expected \[24, 16\]"),
    ({"fc1_weight": ones(24)}, r"fc1_weight has shape \[24\], expected"),
    ({"fc1_weight": ones(24, 16).double()}, "fc1_weight has dtype Double, expected"),
    ({"fc1_bias": ones(16)}, "fc1_bias has 16 elements, expected 24"),
    ({"fc2_weight": ones(24, 16)}, r"fc2_weight has shape \[24, 16\], expected \[16, 24\]"),
    ({"fc2_weight": ones(16, 32)}, r"fc2_weight has shape \[16, 32\], expected \[16, 24\]"),
    ({"fc2_bias": ones(24)}, "fc2_bias has 24 elements, expected 16"),
    ({"layer_scale_2": ones(1)}, "layer_scale_2 has 1 elements, expected 16"),
]


@pytest.mark.parametrize("op", ["block", "block_"])
@pytest.mark.parametrize(("changed", "message"), BLOCK, ids=[message for _, message in BLOCK])
def test_block(changed, message, op):
    with pytest.raises(RuntimeError, match=f"riformer.*{message}"):
        call_block(op=op, **changed)
    assert torch.equal(call_block()[0], GOOD_RESULT), "the next good call works"


def test_int8_is_refused_where_there_are_no_such_products():
    if OPS is torch.ops.riformer:
        pytest.skip("the CPU's blocks have int8 products")
    with pytest.raises(RuntimeError, match="these kernels have no int8 products, only the CPU's have; leave it false"):
        call_block(int8=True)


def test_block_in_place_that_fails_writes_nothing():
    x, moments = X.clone(), MOMENTS.clone()
    bad = GOOD | {"layer_scale_2": ones(1)}
    with pytest.raises(RuntimeError, match="layer_scale_2"):
        OPS.block_(x, moments, *(bad[name] for name in PARAMETERS))
    assert torch.equal(x, X) and torch.equal(moments, MOMENTS)


IMAGES, WEIGHT = ones(2, 3, 9, 8), ones(8, 3, 3, 3)
EMBED = [
    ((IMAGES[0], WEIGHT, None, 2, 1), r"x has shape \[3, 9, 8\], expected \[B, C, H, W\]"),
    ((IMAGES.double(), WEIGHT, None, 2, 1), "x has dtype Double, expected Float, BFloat16 or Half"),
    ((IMAGES.byte(), WEIGHT, None, 2, 1), "x has dtype Byte, expected"),
    ((IMAGES[:, :2], WEIGHT, None, 2, 1), r"weight has shape \[8, 3, 3, 3\] for images of shape \[2, 2, 9, 8\]"),
    ((IMAGES, WEIGHT[:, :, 0], None, 2, 1), r"weight has shape \[8, 3, 3\] .*expected \[channels, 3, kernel height"),
    ((IMAGES, WEIGHT.double(), None, 2, 1), "weight has dtype Double, expected"),
    ((IMAGES, WEIGHT, ones(7), 2, 1), "bias has 7 elements, expected 8"),
    ((IMAGES, WEIGHT, ones(8).int(), 2, 1), "bias has dtype Int, expected"),
    ((IMAGES, WEIGHT, None, 0, 1), "stride 0 and padding 1, expected >= 1 and >= 0"),
    ((IMAGES, WEIGHT, None, -2, 1), "stride -2 and padding 1, expected >= 1"),
    ((IMAGES, WEIGHT, None, 2, -1), "stride 2 and padding -1, expected >= 1 and >= 0"),
    ((IMAGES[:, :, :2], WEIGHT, None, 2, 0), "images of 2x8 are smaller than the 3x3 kernel with padding 0"),
    ((IMAGES[:, :, :, :0], WEIGHT, None, 2, 1), "images of 9x0 are smaller than the 3x3 kernel with padding 1"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), EMBED, ids=[message for _, message in EMBED])
def test_embed(arguments, message):
    with pytest.raises(RuntimeError, match=f"riformer.*{message}"):
        OPS.embed(*arguments, torch.float32, True)
    out, _ = OPS.embed(IMAGES, WEIGHT, None, 2, 1, torch.float32, True)
    assert torch.equal(out[:, :, 1, 1], torch.full((2, 8), 27.0)), "the next good call works"


def test_embed_into_a_dtype_that_is_none():
    with pytest.raises(RuntimeError, match="the result has dtype Double, expected Float, BFloat16 or Half"):
        OPS.embed(IMAGES, WEIGHT, None, 2, 1, torch.float64, True)


# In another process: what is tested is that these are errors and do not bring the process down.
EMPTY_KERNELS = ["[2, 0, 9, 8] [8, 0, 3, 3]", "[2, 3, 9, 8] [8, 3, 0, 0]", "[2, 3, 9, 8] [8, 3, 0, 3]"]


@pytest.mark.skipif(OPS is not torch.ops.riformer, reason="the process has the CPU's bindings")
@pytest.mark.parametrize("shapes", EMPTY_KERNELS)
def test_embed_with_nothing_to_sum(shapes):
    x, weight = shapes.replace("] [", "]|[").split("|")
    code = f"""
import torch, riformer_kernels
from riformer_kernels.backends import cpu
cpu.unusable()
try:
    out, _ = torch.ops.riformer.embed(torch.ones({x}), torch.ones({weight}), torch.ones(8), 2, 1, torch.float32, True)
    assert (out == 1).all()
except RuntimeError as error:
    assert "riformer" in str(error), error
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr[-500:]}"


NORM = [
    ((X[0], MOMENTS, ones(16), ones(16)), r"x has shape \[16, 5, 7\], expected \[B, C, H, W\]"),
    ((X.double(), MOMENTS, ones(16), ones(16)), "x has dtype Double, expected"),
    ((X, None, ones(16), ones(16)), "moments are missing"),
    ((X, MOMENTS[:1], ones(16), ones(16)), r"moments have shape \[1, 2, 16\], expected \[3, 2, 16\]"),
    ((X, MOMENTS.half(), ones(16), ones(16)), "moments have dtype Half, expected Float"),
    ((X, MOMENTS, ones(8), ones(16)), "weight has 8 elements, expected 16"),
    ((X, MOMENTS, ones(16), ones(1)), "bias has 1 elements, expected 16"),
    ((X, MOMENTS, ones(16).double(), ones(16)), "weight has dtype Double, expected"),
]


@pytest.mark.parametrize(("arguments", "message"), NORM, ids=[message for _, message in NORM])
def test_norm(arguments, message):
    with pytest.raises(RuntimeError, match=f"riformer.*{message}"):
        OPS.norm(*arguments, 1e-5, False, torch.float32)
    assert OPS.norm(X, MOMENTS, ones(16), ones(16), 1e-5, False, torch.float32).shape == X.shape


FC = ones(10, 16)
HEAD = [
    ((X[0], MOMENTS, ones(16), ones(16), 1e-5, FC, None), r"x has shape \[16, 5, 7\], expected \[B, C, H, W\]"),
    ((X.double(), MOMENTS, ones(16), ones(16), 1e-5, FC, None), "x has dtype Double, expected"),
    ((X, None, ones(16), ones(16), 1e-5, FC, None), "moments are missing"),
    ((X, MOMENTS[:, :, :8], ones(16), ones(16), 1e-5, FC, None), r"moments have shape \[3, 2, 8\]"),
    ((X, MOMENTS, ones(8), ones(16), 1e-5, FC, None), "norm_weight has 8 elements, expected 16"),
    ((X, MOMENTS, ones(16), ones(8), 1e-5, FC, None), "norm_bias has 8 elements, expected 16"),
    ((X, MOMENTS, ones(16), ones(16), 1e-5, ones(10, 8), None), r"fc_weight has shape \[10, 8\], expected \[10, 16\]"),
    ((X, MOMENTS, ones(16), ones(16), 1e-5, ones(16), None), r"fc_weight has shape \[16\], expected"),
    ((X, MOMENTS, ones(16), ones(16), 1e-5, FC, ones(16)), "fc_bias has 16 elements, expected 10"),
    ((X, MOMENTS, ones(16), ones(16), 1e-5, FC.double(), None), "fc_weight has dtype Double, expected"),
    ((X[:, :, :0], MOMENTS, ones(16), ones(16), 1e-5, FC, None), r"\[3, 16, 0, 7\]: there is nothing to pool"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), HEAD, ids=[message for _, message in HEAD])
def test_head(arguments, message):
    with pytest.raises(RuntimeError, match=f"riformer.*{message}"):
        OPS.head(*arguments, False, torch.float32)
    assert OPS.head(X, MOMENTS, ones(16), ones(16), 1e-5, FC, None, False, torch.float32).shape == (3, 10)


MOMENTS_OP = [
    (X[0], r"x has shape \[16, 5, 7\], expected \[B, C, H, W\]"),
    (X.double(), "x has dtype Double, expected Float, BFloat16 or Half"),
    (X.int(), "x has dtype Int, expected"),
    (X[:, :, :0], r"x has shape \[3, 16, 0, 7\]: moments of no positions do not exist"),
]


@pytest.mark.parametrize(("x", "message"), MOMENTS_OP, ids=[message for _, message in MOMENTS_OP])
def test_moments(x, message):
    with pytest.raises(RuntimeError, match=f"riformer.*{message}"):
        OPS.moments(x)
    assert torch.equal(OPS.moments(X), MOMENTS)


def test_block_without_positions_has_no_moments_to_return():
    """As ``moments`` itself: an error, or numbers that say so. Not whatever the memory held."""
    x = X[:, :, :0]
    for _ in range(20):
        filled = [torch.full((3, 2, 16), 12345.0) for _ in range(50)]  # what a fresh allocation is likely to hold
        del filled
        error, found = result_or_error(x)
        if error is not None:
            assert "positions" in error
            return
        out, moments = found
        assert out.shape == x.shape and not (moments == 12345.0).any(), "moments were not written"


def result_or_error(x):
    """The text of the error, and the result, of which one is None."""
    try:
        return None, OPS.block(x, torch.zeros(3, 2, 16), *(GOOD[name] for name in PARAMETERS))
    except RuntimeError as error:
        return str(error), None
