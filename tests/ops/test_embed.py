"""``embed``, the stem and the downsampling convolutions, on every instruction set of this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support_cases import DTYPES, LAYOUTS, all_pairs, lay_out, per_dtype, tokens
from support_cpu import CPU, OPS, per_isa
from support_embed import DOWNSAMPLE, STEM, Embed, check_embed, embed_parameters

from riformer_kernels.machine import threads

SIZES = ((7, 7), (9, 7), (17, 20), (33, 32), (56, 41))
WEIGHTS = ("nchw", "channels_last", "strided", "offset")
GRID = (
    all_pairs(
        Embed, 40_000_000, in_channels=(8, 15, 16, 24, 64), channels=(8, 24, 96, 128, 320), size=SIZES, dtype=DTYPES,
        parameters=(None, *DTYPES), layout=LAYOUTS, weight_layout=WEIGHTS, bias=(True, False), batch=(1, 3, 5),
    )
    + tuple(
        replace(case, **STEM)
        for case in all_pairs(
            Embed, 40_000_000, in_channels=(1, 2, 3, 4, 5), channels=(8, 16, 64, 96), size=SIZES, dtype=DTYPES,
            images=(None, *DTYPES), parameters=(None, *DTYPES), layout=LAYOUTS, weight_layout=WEIGHTS, batch=(1, 3),
        )
    )
    + all_pairs(
        Embed, 40_000_000, in_channels=(1, 3, 6), channels=(1, 7, 20, 48), kernel=((1, 1), (2, 2), (3, 5), (5, 4)),
        stride=(1, 2, 3, 4, 5), padding=(0, 1, 3), size=((5, 5), (9, 7), (17, 20)), dtype=DTYPES,
        weight_layout=("nchw", "channels_last"), layout=("nchw", "channels_last", "sliced"),
    )
)  # fmt: skip


@per_isa
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(isa, case):
    check_embed(CPU.embed, case, isa)


@per_isa
@per_dtype
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("size", [(224, 224), (225, 193), (32, 32)])
def test_stem_of_the_model(isa, dtype, layout, size):
    check_embed(CPU.embed, Embed(3, 64, size=size, dtype=dtype, layout=layout, batch=1, **STEM), isa)


@per_isa
@per_dtype
@pytest.mark.parametrize(("channels", "size"), [((64, 128), (56, 56)), ((320, 512), (14, 14)), ((96, 192), (7, 5))])
def test_downsampling_of_the_model(isa, dtype, channels, size):
    if isa == "scalar" and channels[0] == 64:
        size = (21, 20)  # 231 million multiply-adds at 56x56
    check_embed(CPU.embed, Embed(*channels, size=size, dtype=dtype, batch=1, **DOWNSAMPLE), isa)


@per_isa
@per_dtype
def test_images_of_float32_and_results_of_another_dtype(isa, dtype):
    """Golden takes images and parameters as they are; eager has to round both to the result's dtype first."""
    case = Embed(3, 64, size=(64, 48), dtype=dtype, images=torch.float32, parameters=torch.float32, **STEM)
    check_embed(CPU.embed, case, isa)


@per_isa
@per_dtype
@pytest.mark.parametrize("size", [(3, 3), (3, 9), (6, 4)])
def test_images_smaller_than_the_kernel(isa, dtype, size):
    """With the padding they are just large enough: one position, most taps of which are padding."""
    check_embed(CPU.embed, Embed(3, 16, size=size, dtype=dtype, batch=5, **STEM), isa)


@per_isa
@per_dtype
@pytest.mark.parametrize("in_channels", [3, 8])
@pytest.mark.parametrize("shape", [STEM, DOWNSAMPLE], ids=["stem", "downsample"])
def test_every_layout_gives_the_same_bits(isa, dtype, in_channels, shape):
    """Of the images. A weight in channels_last may be summed in its own order: there the rule holds, see the grid."""
    case = Embed(in_channels, 24, size=(21, 18), dtype=dtype, **shape)
    x, parameters = tokens(case, 0, in_channels), embed_parameters(case, 0)
    out, moments = CPU.embed(x, parameters, dtype)
    for layout in LAYOUTS:
        found = CPU.embed(lay_out(x, layout), parameters, dtype)
        first = slice(0, 1) if layout == "expanded" else slice(None)
        assert torch.equal(found[0][first], out[first]) and torch.equal(found[1][first], moments[first]), layout
    spread = parameters["bias"].new_full((48,), float("nan"))
    spread[::2] = parameters["bias"]
    assert torch.equal(CPU.embed(x, parameters | {"bias": spread[::2]}, dtype)[0], out)


@per_isa
@per_dtype
@pytest.mark.parametrize("shape", [STEM, DOWNSAMPLE], ids=["stem", "downsample"])
def test_without_moments(isa, dtype, shape):
    case = Embed(3, 24, size=(21, 18), dtype=dtype, **shape)
    x, parameters = tokens(case, 0, 3), embed_parameters(case, 0)
    out, moments = CPU.embed(x, parameters, dtype)
    found, none = OPS.embed(x, *parameters.values(), dtype, False)
    assert torch.equal(found, out) and none.shape == (3, 2, 0) and none.dtype == torch.float32
    assert torch.equal(OPS.moments(out), moments), "the moments are those of what was written, to the bit"


@per_isa
@per_dtype
def test_empty_batch(isa, dtype):
    case = Embed(3, 24, size=(21, 18), dtype=dtype, batch=0, **STEM)
    for layout in ("nchw", "channels_last"):
        x = tokens(replace(case, layout=layout), 0, 3)
        out, moments = CPU.embed(x, embed_parameters(case, 0), dtype)
        assert out.shape == (0, 24, 5, 4) and moments.shape == (0, 2, 24) and out.dtype == dtype


@per_isa
@per_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("in_channels", [3, 8])
def test_one_bad_value_stays_in_its_windows(isa, dtype, value, in_channels):
    case = Embed(in_channels, 24, size=(21, 18), dtype=dtype, batch=4)
    x, parameters = tokens(case, 0, in_channels), embed_parameters(case, 0)
    clean, clean_moments = CPU.embed(x, parameters, dtype)
    x[1, 2, 10, 9] = value
    found, moments = CPU.embed(x, parameters, dtype)
    touched = torch.zeros_like(found, dtype=torch.bool)
    touched[1, :, 5, 4:6] = True  # rows 2 * 5 - 1 + [0, 3) and columns 2 * 4 - 1 + [0, 3), 2 * 5 - 1 + [0, 3)
    assert torch.equal(found.isfinite(), ~touched) and torch.equal(found[~touched], clean[~touched])
    for image in (0, 2, 3):
        assert torch.equal(moments[image], clean_moments[image])


@per_isa
@per_dtype
def test_an_image_gives_the_same_bits_alone_and_in_any_batch(isa, dtype):
    for shape, in_channels, size in ((STEM, 3, (37, 50)), (DOWNSAMPLE, 16, (15, 13))):
        case = Embed(in_channels, 24, size=size, dtype=dtype, batch=17, **shape)
        x, parameters = tokens(case, 0, in_channels), embed_parameters(case, 0)
        alone = [CPU.embed(image[None], parameters, dtype) for image in x]
        for batch, firsts in ((2, (0, 7, 15)), (5, (0, 3, 12)), (17, (0,))):
            for first in firsts:
                found = CPU.embed(x[first : first + batch], parameters, dtype)
                for i in range(batch):
                    for mine, wanted in zip(found, alone[first + i], strict=True):
                        assert torch.equal(mine[i], wanted[0]), f"{isa} {case}: image {first + i} in {batch}"


@per_isa
@per_dtype
@pytest.mark.parametrize("shape", [STEM, DOWNSAMPLE], ids=["stem", "downsample"])
def test_threads_and_runs_change_nothing(isa, dtype, shape):
    case = Embed(4, 24, size=(67, 70), dtype=dtype, **shape)
    x, parameters = tokens(case, 0, 4), embed_parameters(case, 0)
    expected = CPU.embed(x, parameters, dtype)
    for count in (1, 2, 3, 4):
        with threads(count):
            for _ in range(3):
                for mine, wanted in zip(CPU.embed(x, parameters, dtype), expected, strict=True):
                    assert torch.equal(mine, wanted), f"{isa} {case} with {count} threads"
