"""``block`` and ``block_`` on every instruction set of this machine, against the error-ratio rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support_block import PARAMETERS, Block, block_parameters, check_block, eager_block
from support_cases import DTYPES, LAYOUTS, lay_out, like, per_dtype, per_norm, tokens
from support_cpu import CPU, OPS, per_isa
from support_moments import check_moments

from riformer_kernels.machine import threads


def in_place(x, parameters, moments=None):
    """``block_`` on ``x`` itself: (x, moments)."""
    if moments is None and not parameters["per_position"]:
        moments = OPS.moments(x)
    OPS.block_(x, moments, *(parameters[name] for name in PARAMETERS))
    return x, moments


@per_isa
@per_dtype
@pytest.mark.parametrize("hidden", [8, 24, 256, 264, 1000])
@pytest.mark.parametrize("channels", [8, 40])
def test_hidden_widths(isa, dtype, hidden, channels):
    check_block(CPU.block, Block(channels, (9, 7), dtype, hidden=hidden, residual=False), isa)


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_parameters_of_another_dtype(isa, dtype, norm, parameters):
    """Golden takes the parameters as they are; eager has to round them to the tokens' dtype first."""
    check_block(CPU.block, Block(40, (9, 7), dtype, norm, residual=False, parameters=parameters, hidden=72), isa)


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("values", ["small", "mean1000", "subnormal"])
@pytest.mark.parametrize("residual", [True, False])
def test_special_values(isa, dtype, norm, values, residual):
    channels = 64 if values == "subnormal" else 16
    check_block(CPU.block, Block(channels, (9, 7), dtype, norm, values=values, residual=residual), isa)


ABSENT = [("fc1_bias",), ("fc2_bias",), ("layer_scale_2",), ("affine_bias",),
          ("fc1_bias", "fc2_bias", "layer_scale_2", "affine_bias")]  # fmt: skip


@per_isa
@per_norm
@pytest.mark.parametrize("absent", ABSENT, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absent_arguments(isa, norm, absent, dtype):
    check_block(CPU.block, Block(24, (9, 7), dtype, norm, absent=absent), isa)


@per_isa
def test_eps_of_each_norm(isa):
    case = Block(values="small")
    x, parameters = tokens(case, 0, 16), block_parameters(case, 0) | {"eps1": 1e-3, "eps2": 1e-6}
    golden = eager_block(x.double(), parameters)
    found, _ = CPU.block(x, parameters)
    assert (found - golden).abs().max() < 2e-4 * golden.abs().max(), f"{isa}: {(found - golden).abs().max()}"


# ------------------------------------------------------------------------------------------------------- layouts


@per_isa
@per_dtype
@per_norm
def test_every_layout_gives_the_same_bits(isa, dtype, norm):
    case = Block(24, (9, 7), dtype, norm)
    x, parameters = tokens(case, 0, 24), block_parameters(case, 0)
    out, moments = CPU.block(x, parameters)
    for layout in LAYOUTS:
        view = lay_out(x, layout)
        found, found_moments = CPU.block(view, parameters)
        first = slice(0, 1) if layout == "expanded" else slice(None)
        assert torch.equal(found[first], out[first]) and torch.equal(found_moments[first], moments[first]), layout
        assert found.stride() == like(view).stride(), layout


@per_isa
@per_dtype
def test_layouts_of_parameters(isa, dtype):
    case = Block(24, (7, 5), dtype, hidden=40)
    x, parameters = tokens(case, 0, 24), block_parameters(case, 0)
    expected = CPU.block(x, parameters)

    def strided(weight):
        return lay_out(weight.reshape(*weight.shape[:2], 1, 1), "strided")

    forms = {
        "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
        "two dimensions": lambda w: w.flatten(1),
        "transposed": lambda w: w.flatten(1).t().contiguous().t(),
        "columns of a wider matrix": lambda w: torch.cat((w.flatten(1), w.flatten(1)), 1)[:, : w.shape[1]],
        "strided": strided,
        "offset": lambda w: lay_out(w, "offset"),
    }
    for name, form in forms.items():
        changed = parameters | {key: form(parameters[key]) for key in ("fc1_weight", "fc2_weight")}
        for found, wanted in zip(CPU.block(x, changed), expected, strict=True):
            assert torch.equal(found, wanted), f"{isa} {dtype}: fc weights {name}"
    for key, value in parameters.items():
        if isinstance(value, torch.Tensor) and value.dim() == 1:
            spread = value.new_full((2 * value.numel(),), float("nan"))
            spread[::2] = value
            found = CPU.block(x, parameters | {key: spread[::2]})
            assert torch.equal(found[0], expected[0]), f"{isa} {dtype}: {key} with stride 2"
    flat = parameters | {"affine_weight": parameters["affine_weight"].flatten()}
    assert torch.equal(CPU.block(x, flat)[0], expected[0])


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("shape", [(0, 16, 7, 7), (0, 512, 1, 1)])
def test_empty_batch(isa, dtype, norm, shape):
    case = Block(shape[1], shape[2:], dtype, norm, batch=0)
    for layout in ("nchw", "channels_last"):
        x = tokens(replace(case, layout=layout), 0, shape[1])
        out, moments = CPU.block(x, block_parameters(case, 0))
        assert out.shape == shape and out.dtype == dtype
        assert moments.shape == (0, 2, 0 if norm == "ln" else shape[1]) and moments.dtype == torch.float32
        in_place(x, block_parameters(case, 0))


# -------------------------------------------------------------------------------------------------- special inputs


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("mean", [0.0, 1.0, -100.0])
def test_constant_image(isa, dtype, norm, mean):
    """Without variance the norm's result is its bias, and an error of the mean is multiplied by 1 / sqrt(eps). What is
    allowed is that of the mean's last digit, carried through the MLP's absolute gain."""
    case = Block(16, (9, 7), dtype, norm, form="unit", residual=False)
    x = torch.full((2, 16, 9, 7), mean, dtype=dtype)
    parameters = block_parameters(case, 0)
    golden = eager_block(x.double(), parameters)
    found, _ = CPU.block(x, parameters)
    absolute = {k: v.double().flatten(1).abs() for k, v in parameters.items() if k in ("fc1_weight", "fc2_weight")}
    gain = absolute["fc2_weight"] @ absolute["fc1_weight"] @ parameters["norm2_weight"].double().abs()
    of_mean = 2.0**-23 * abs(mean) / 1e-5**0.5 * 1.13 * gain * parameters["layer_scale_2"].double().abs()
    unit = torch.finfo(dtype).eps
    of_rounding = 4 * unit * golden.abs().amax((0, 2, 3)) + 8 * unit * absolute["fc2_weight"].sum(1)
    error = (found - golden).abs().amax((0, 2, 3))
    assert found.isfinite().all() and (error <= of_mean + of_rounding).all(), f"{isa}: {(error / of_mean).max()}"


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [(9, 7), (1, 1), (17, 20)])
def test_one_bad_value_stays_in_its_image(isa, dtype, norm, value, size):
    case = Block(24, size, dtype, norm, batch=4)
    x, parameters = tokens(case, 0, 24), block_parameters(case, 0)
    clean, clean_moments = CPU.block(x, parameters)
    x[1, 5, size[0] // 2, size[1] // 2] = value
    found, moments = CPU.block(x, parameters)
    for image in (0, 2, 3):
        assert torch.equal(found[image], clean[image]) and torch.equal(moments[image], clean_moments[image])
    assert torch.equal(found.isnan(), eager_block(x.double(), parameters).isnan()), "NaN where float64 has NaN"


@per_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@per_norm
def test_layer_scales_of_zero_give_back_the_input(isa, dtype, norm):
    """To the bit, subnormals too (bfloat16's are flushed by the instruction that rounds to it)."""
    case = Block(16, (9, 7), dtype, norm)
    zero = torch.zeros(16, dtype=dtype)
    parameters = block_parameters(case, 0) | {"layer_scale_1": zero, "layer_scale_2": zero}
    for values in ("normal", "small", "subnormal"):
        x = tokens(replace(case, values=values), 0, 16)
        assert torch.equal(CPU.block(x, parameters)[0], x), values


# ------------------------------------------------------------------------------------------- the same bits, always


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize(("channels", "size"), [(16, (1, 1)), (24, (9, 7)), (40, (17, 20))])
def test_an_image_gives_the_same_bits_alone_and_in_any_batch(isa, dtype, norm, channels, size):
    case = Block(channels, size, dtype, norm, batch=17)
    x, parameters = tokens(case, 0, channels), block_parameters(case, 0)
    alone = [CPU.block(image[None], parameters) for image in x]
    for batch, firsts in ((2, (0, 7, 15)), (5, (0, 3, 12)), (17, (0,))):
        for first in firsts:
            found = CPU.block(x[first : first + batch], parameters)
            for i in range(batch):
                for mine, wanted in zip(found, alone[first + i], strict=True):
                    assert torch.equal(mine[i], wanted[0]), f"{isa} {case}: image {first + i} in a batch of {batch}"


@per_isa
@per_dtype
@pytest.mark.parametrize(
    ("channels", "hidden", "size"), [(40, 1288, (7, 7)), (320, 1280, (14, 14)), (64, 24, (19, 20)), (8, 8, (1, 1))]
)
def test_sharing_channels_changes_nothing(isa, dtype, channels, hidden, size):
    """Few tokens: several threads share the channels. One thread, and a batch, share the tokens."""
    case = Block(channels=channels, hidden=hidden, size=size, dtype=dtype, batch=9)
    parameters = block_parameters(case, 0)
    x = tokens(case, 0, channels)
    with threads(1):
        wanted, wanted_moments = CPU.block(x, parameters)
    for count in (2, 3, 7):
        with threads(count):
            for first, last in ((0, 1), (4, 6), (0, 9)):
                found, moments = CPU.block(x[first:last].contiguous(), parameters)
                label = f"{isa} {case} images {first}..{last} with {count} threads"
                assert torch.equal(found, wanted[first:last]), label
                assert torch.equal(moments, wanted_moments[first:last]), label


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("size", [(9, 7), (28, 28)])
def test_threads_and_runs_change_nothing(isa, dtype, norm, size):
    case = Block(24, size, dtype, norm, batch=3)
    x, parameters = tokens(case, 0, 24), block_parameters(case, 0)
    expected = CPU.block(x, parameters)
    for count in (1, 2, 3, 4):
        with threads(count):
            for _ in range(3):
                for mine, wanted in zip(CPU.block(x, parameters), expected, strict=True):
                    assert torch.equal(mine, wanted), f"{isa} {case} with {count} threads"


# -------------------------------------------------------------------------------------------------------- in place


@per_isa
@per_dtype
@per_norm
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("residual", [True, False])
def test_in_place_is_the_same_and_touches_nothing_else(isa, dtype, norm, layout, residual):
    case = Block(24, (9, 7), dtype, norm, residual=residual)
    x, parameters = lay_out(tokens(case, 0, 24), layout), block_parameters(case, 0)
    out, moments = CPU.block(x, parameters)
    whole = x._base if x._base is not None and x._base.numel() > x.numel() else None
    around = None if whole is None else whole.isnan().sum().item()
    found, found_moments = in_place(x, parameters)
    assert torch.equal(found, out), f"{isa} {case} {layout}"
    assert norm == "ln" or torch.equal(found_moments, moments)
    assert whole is None or whole.isnan().sum().item() == around, "the memory around x"


@per_isa
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_autograd_sees_that_in_place_writes(isa, layout):
    """Otherwise a tensor that some backward has saved could be overwritten, and that gradient be wrong unnoticed."""
    case = Block(layout=layout)
    x, parameters = tokens(case, 0, 16), block_parameters(case, 0)
    moments = OPS.moments(x)
    versions = x._version, moments._version
    in_place(x, parameters, moments)
    assert x._version > versions[0] and moments._version > versions[1]


@per_isa
@per_dtype
def test_in_place_between_guards(isa, dtype):
    """Bytes on both sides of a contiguous x, and of its moments, stay as they are."""
    case = Block(24, (9, 7), dtype)
    x, parameters = tokens(case, 0, 24), block_parameters(case, 0)
    out, out_moments = CPU.block(x, parameters)
    buffer = torch.full((x.numel() + 130,), 77.0, dtype=dtype)
    inside = buffer[65:-65].view(x.shape)
    inside.copy_(x)
    guarded = torch.full((3, 4, 24), 77.0)
    moments = guarded[:, 1:3]
    moments.copy_(OPS.moments(x))
    in_place(inside, parameters, moments)
    assert torch.equal(inside, out) and torch.equal(moments, out_moments), "moments that are a view are written too"
    assert (buffer[:65] == 77).all() and (buffer[-65:] == 77).all()
    assert (guarded[:, 0] == 77).all() and (guarded[:, 3] == 77).all()


@per_isa
@per_dtype
def test_moments_flow_from_block_to_block(isa, dtype):
    """Three blocks that hand on their moments are three blocks that each take new ones."""
    case = Block(24, (17, 20), dtype, batch=2)
    x, moments, fresh = tokens(case, 0, 24), None, None
    flowing, fresh = x.clone(), x.clone()
    moments = OPS.moments(x)
    for seed in range(3):
        parameters = block_parameters(case, seed)
        in_place(flowing, parameters, moments)
        check_moments(moments, flowing, f"{isa} {case}")
        fresh, _ = CPU.block(fresh, parameters)
        assert torch.equal(OPS.moments(fresh), moments) and torch.equal(fresh, flowing)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx2"], indirect=True)
def test_more_than_2_to_31_elements(isa):
    """257 images of 2^23 elements each: the last one starts where a 32-bit offset ends."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    if available < 8 << 30:
        pytest.skip(f"needs 8 GB of free memory, found {available >> 30} GB")
    case = Block(8, (1024, 1024), torch.bfloat16, batch=1, hidden=8)
    pattern, parameters = tokens(case, 0, 8), block_parameters(case, 0)
    x = torch.empty((257, 8, 1024, 1024), dtype=torch.bfloat16)
    for i in range(257):
        torch.mul(pattern[0], 1 + i / 64, out=x[i])
    kept = {i: x[i : i + 1].clone() for i in (0, 255, 256)}
    assert x.numel() > 2**31
    with threads(2):
        _, moments = in_place(x, parameters)
        for i, image in kept.items():
            expected, expected_moments = CPU.block(image, parameters)
            assert torch.equal(x[i], expected[0]) and torch.equal(moments[i], expected_moments[0]), f"{isa}: image {i}"
