"""What the tests of the ops share: hard parameters, eager forms, goldens, the check functions, and the grids.

Golden is float64 on the values that an op is given; eager is the model's own PyTorch code in the tested dtype and
layout. Both the ops and the mutants (`test_mutants.py`) go through the same `check_*` functions: a check that no
mutant fails would be worth nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from riformer_kernels import numerics
from riformer_kernels.backends import cpu

OPS = torch.ops.riformer
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
LAYOUTS = ("nchw", "channels_last", "offset", "sliced", "strided", "transposed", "expanded")

ISAS: tuple[str, ...] = tuple(cpu.isa_status()["supported"])
# An instruction set that the machine lacks is not in the grid; `test_moments.py` skips once for each, by name.
per_isa = pytest.mark.parametrize("isa", ISAS or ("none",), indirect=True)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
per_norm = pytest.mark.parametrize("norm", ["gn", "ln"])


def need_native() -> None:
    """Without the native library: a failure, unless RIFORMER_CPU=off asked for it. Modules call it too."""
    reason = cpu.unusable()
    if reason and os.environ.get("RIFORMER_CPU") == "off":
        pytest.skip(f"RIFORMER_CPU=off: {reason}", allow_module_level=True)
    assert reason is None, f"the native library is not usable: {reason}"


@contextlib.contextmanager
def selected(isa: str) -> Iterator[str]:
    """The instruction set to use meanwhile."""
    need_native()
    before = cpu.isa_status()["chosen"]
    cpu.select_isa(isa)
    try:
        yield isa
    finally:
        cpu.select_isa(before)


@pytest.fixture(name="isa")
def isa_fixture(request: pytest.FixtureRequest) -> Iterator[str]:
    with selected(request.param) as isa:
        yield isa


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Modules that import this run in one thread, where nothing else is asked for: small work, and busy machines."""
    with threads(1):
        yield


# ---------------------------------------------------------------------------------------------------- cases and values


@dataclass(frozen=True)
class Block:
    """A case of ``block``. ``form``: "training" and "deployed" blocks, or the LN-1x1 "unit", no first half."""

    channels: int = 16
    size: tuple[int, int] = (9, 7)
    dtype: torch.dtype = torch.float32
    norm: str = "gn"
    form: str = "training"
    residual: bool = True
    layout: str = "nchw"
    batch: int = 3
    hidden: int | None = None  # None: 4 * channels
    parameters: torch.dtype | None = None  # None: the tokens' dtype
    values: str = "normal"
    absent: tuple[str, ...] = ()
    seed: int = 0

    @property
    def width(self) -> int:
        return self.hidden or 4 * self.channels

    @property
    def work(self) -> int:
        """Multiply-adds of one call."""
        return 2 * self.channels * self.width * self.size[0] * self.size[1] * self.batch

    def __str__(self) -> str:
        return described(self)


def described(case: Any) -> str:
    """What differs from the defaults, and the seed: enough to build the case again."""
    parts = []
    for field in fields(case):
        value = getattr(case, field.name)
        if value != field.default or field.name in ("dtype", "channels", "size", "seed"):
            parts.append(f"{field.name}={str(value).removeprefix('torch.')}")
    return f"{type(case).__name__}({', '.join(parts)})"


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``x`` [B, C, H, W] in another layout. What lies between them is NaN: who reads it shows it."""
    batch, channels, height, width = x.shape
    if layout == "nchw":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return x[:1].contiguous().expand(x.shape)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":
        buffer = x.new_full((x.numel() + 3,), float("nan"))
        view = buffer[3:].view(x.shape)
    elif layout == "sliced":
        buffer = x.new_full((batch, channels, height + 3, width + 2), float("nan"))
        view = buffer[:, :, 1 : height + 1, 2:]
    elif layout == "strided":
        buffer = x.new_full((batch, 2 * channels, height, 2 * width), float("nan"))
        view = buffer[:, ::2, :, ::2]
    else:
        raise ValueError(layout)
    view.copy_(x)
    return view


def draws(seed: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).to(dtype)

    return draw


def tokens(case: Any, seed: int, channels: int) -> torch.Tensor:
    draw = draws(seed, torch.float32)
    shape = (case.batch, channels, *case.size)
    values = getattr(case, "values", "normal")
    if values == "normal":
        x = draw(*shape) + draw(1, channels, 1, 1, std=0.5)
    elif values == "subnormal":
        x = draw(*shape) * (1e-5 if case.dtype == torch.float16 else 1e-39)
    else:
        x = {"small": 0.0, "mean1000": 1000.0}[values] + draw(*shape, std={"small": 3e-3, "mean1000": 1.0}[values])
    return lay_out(x.to(getattr(case, "images", None) or case.dtype), case.layout)


PARAMETERS = (
    "layer_scale_1", "norm1_weight", "norm1_bias", "affine_weight", "affine_bias", "eps1", "norm2_weight", "norm2_bias",
    "eps2", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale_2", "per_position", "residual",
)  # fmt: skip


def block_parameters(case: Block, seed: int) -> dict[str, Any]:
    """Hard parameters: a layer scale of about a half, and nothing at its neutral value."""
    draw = draws(seed + 1, case.parameters or case.dtype)
    c, hidden = case.channels, case.width
    first, affine = case.form != "unit", case.form == "training"
    found: dict[str, Any] = {
        "layer_scale_1": draw(c, std=0.3, mean=0.5) if first else None,
        "norm1_weight": (draw(c, std=0.25, mean=1.0) if affine else draw(c, std=0.5)) if first else None,
        "norm1_bias": draw(c, std=0.25) if first else None,
        "affine_weight": draw(c, 1, 1, 1, std=0.5, mean=1.0) if affine else None,
        "affine_bias": draw(c, std=0.25) if affine else None,
        "eps1": EPS,
        "norm2_weight": draw(c, std=0.25, mean=1.0),
        "norm2_bias": draw(c, std=0.25),
        "eps2": EPS,
        "fc1_weight": draw(hidden, c, 1, 1, std=c**-0.5),
        "fc1_bias": draw(hidden, std=0.5),
        "fc2_weight": draw(c, hidden, 1, 1, std=1.5 * hidden**-0.5),
        "fc2_bias": draw(c, std=0.25),
        "layer_scale_2": draw(c, std=0.3, mean=0.5),
        "per_position": case.norm == "ln",
        "residual": case.residual,
    }
    return found | dict.fromkeys(case.absent)


# ------------------------------------------------------------------------------------------------ eager and golden


def eager_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, per_position: bool
) -> torch.Tensor:
    """As the model's `make_norm` has it."""
    if not per_position:
        return F.group_norm(x, 1, weight, bias, eps)
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)


def eager_block(x: torch.Tensor, parameters: dict[str, Any], **changed: Any) -> torch.Tensor:
    """As `riformer.model.RIFormerBlock` computes it, in ``x``'s dtype (float64: golden)."""
    p = {k: v.to(x.dtype) if isinstance(v, torch.Tensor) else v for k, v in {**parameters, **changed}.items()}
    y = x
    if p["norm1_weight"] is not None:
        mixed = eager_norm(x, p["norm1_weight"], p["norm1_bias"], p["eps1"], p["per_position"])
        if p["affine_weight"] is not None:
            weight = p["affine_weight"].reshape(-1, 1, 1, 1)
            mixed = F.conv2d(mixed, weight, p["affine_bias"], groups=x.shape[1]) - mixed
        y = x + p["layer_scale_1"][:, None, None] * mixed
    z = eager_norm(y, p["norm2_weight"], p["norm2_bias"], p["eps2"], p["per_position"])
    matrix = lambda weight: weight.reshape(*weight.shape[:2], 1, 1)  # noqa: E731
    hidden = F.gelu(F.conv2d(z, matrix(p["fc1_weight"]), p["fc1_bias"]))
    branch = F.conv2d(hidden, matrix(p["fc2_weight"]), p["fc2_bias"])
    if p["layer_scale_2"] is not None:
        branch = p["layer_scale_2"][:, None, None] * branch
    return y + branch if p["residual"] else branch


# Small results make the ratios noisy: the largest error of 8 values against the largest of 8 others is off by 2 every
# few runs, with nothing wrong. So a case is drawn with several seeds, parameters too, and the results are stacked along
# the batch until there are this many values, and one comparison is made of all.
POOLED = 12_000
MOST_SEEDS = 48


def seeds_of(case: Any, values: int) -> list[int]:
    if getattr(case, "values", "normal") == "subnormal":
        values = values // (case.size[0] * case.size[1])  # every position has the same result, or nearly
    count = min(MOST_SEEDS, max(1, -(-POOLED // max(values, 1))))
    return [1000 * case.seed + 2 * i for i in range(count)]


@dataclass(frozen=True)
class Expected:
    """The arguments of every draw, and eager's and golden's results stacked along the batch."""

    arguments: list[tuple[torch.Tensor, dict[str, Any]]]
    eager: torch.Tensor
    golden: torch.Tensor


@lru_cache(maxsize=32)
@torch.no_grad()
def expected_block(case: Block) -> Expected:
    values = case.batch * case.channels * case.size[0] * case.size[1]
    arguments = [(tokens(case, s, case.channels), block_parameters(case, s)) for s in seeds_of(case, values)]
    golden = [eager_block(x.double().contiguous(), p) for x, p in arguments]
    return Expected(arguments, torch.cat([eager_block(x, p) for x, p in arguments]), torch.cat(golden))


# ---------------------------------------------------------------------------------------------------------- checks


def check_ratios(
    found: torch.Tensor, eager: torch.Tensor, golden: torch.Tensor, label: str, dtype: torch.dtype | None = None
) -> numerics.ErrorRatios:
    """The error-ratio rule of DESIGN section 4; ``label`` says what would have to be run to see it again."""
    ratios = numerics.compare(found, eager, golden, dtype)
    assert ratios.passed, (
        f"{label}: {', '.join(ratios.exceeded)}\n  ours  {ratios.ours}\n  eager {ratios.eager}\n"
        f"  pooled over {found.shape[0]} images"
    )
    return ratios


def native_block(x: torch.Tensor, parameters: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    moments = None if parameters["per_position"] else OPS.moments(x)
    return OPS.block(x, moments, *(parameters[name] for name in PARAMETERS))


def check_block(run: Callable[..., Any], case: Block, label: str = "") -> numerics.ErrorRatios:
    """``run(x, parameters) -> (out, moments)`` on every draw of ``case``."""
    label = f"{label}: {case}"
    expected = expected_block(case)
    found = []
    for x, parameters in expected.arguments:
        before = x.clone()
        out, moments = run(x, parameters)
        assert torch.equal(x, before), f"{label}: x was written to"
        assert out.shape == x.shape and out.dtype == x.dtype, f"{label}: {out.shape} {out.dtype}"
        assert out.stride() == like(x).stride(), f"{label}: strides {out.stride()}, expected {like(x).stride()}"
        check_moments(moments, out, label, none=case.norm == "ln")
        found.append(out)
    return check_ratios(torch.cat(found), expected.eager, expected.golden, label)


def like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor in the layout that a result on ``x`` has: channels_last where ``x`` is, NCHW otherwise."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(x.shape, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# In units of float32's rounding error. Tile means of at most 64 values are merged one after the other: each of at most
# T = 49 merges rounds the mean once, and an old error keeps shrinking with its share, so sqrt(T) / 3 is typical.
MOMENT_UNITS = 8.0


def check_moments(moments: torch.Tensor, x: torch.Tensor, label: str, none: bool = False) -> None:
    """``moments`` against those of ``x`` in float64: means within units of the channel's size, the centred sums of
    squares within units of themselves (which E[x^2] - E[x]^2 misses by far where the mean is large)."""
    shape = (x.shape[0], 2, 0 if none else x.shape[1])
    assert moments.shape == shape and moments.dtype == torch.float32, (
        f"{label}: moments {moments.shape} {moments.dtype}"
    )
    if none or not x.numel():
        return
    values = x.double().flatten(2)
    mean = values.mean(2)
    centred = (values - mean[:, :, None]).square().sum(2)
    unit = 2.0**-24
    count = values.shape[2]
    mean_error = (moments[:, 0] - mean).abs() / (unit * (values.abs().amax(2) + 1e-30))
    # A mean that is off by e adds N e^2, and every difference from it carries a rounding of the mean's size.
    off = MOMENT_UNITS * unit * values.abs().amax(2)
    slack = MOMENT_UNITS * unit * centred + count * off.square() + off * (count * centred).sqrt() / 4 + 1e-37
    assert mean_error.max() <= MOMENT_UNITS, f"{label}: a mean is off by {mean_error.max():.1f} units of its channel"
    wrong = ((moments[:, 1] - centred).abs() / slack).max()
    assert wrong <= 1, f"{label}: a centred sum of squares is off by {wrong:.1f} times what rounding allows"


# ----------------------------------------------------------------------------------------------------------- grids


@cache
def all_pairs(kind: type, limit: int, **factors: tuple) -> tuple:
    """Cases of ``kind`` in which every two values of two factors meet at least once, none with more than ``limit``
    multiply-adds (pairs that only dearer cases have are left out). Greedy, and the same on every machine."""
    chance = random.Random(0)
    names = list(factors)

    def pairs_of(case: Any) -> set:
        values = [(name, getattr(case, name)) for name in names]
        return {(values[i], values[j]) for i in range(len(names)) for j in range(i)}

    missing = {
        ((a, x), (b, y)) for i, a in enumerate(names) for b in names[:i] for x in factors[a] for y in factors[b]
    }  # fmt: skip
    cases = []
    for wanted in sorted(missing, key=repr):
        if wanted not in missing:
            continue
        tries = []
        for _ in range(120):
            case = kind(**({name: chance.choice(factors[name]) for name in names} | dict(wanted)))
            if case.work <= limit:
                tries.append(case)
        if tries:
            best = max(tries, key=lambda case: len(pairs_of(case) & missing))
            missing -= pairs_of(best)
            cases.append(replace(best, seed=len(cases)))
    return tuple(cases)


# The cases that the semantics hang on, all float32: no bfloat16 row sees a tanh GELU, a dropped eps or a rounded rstd.
SEMANTICS = tuple(
    Block(norm=norm, form=form, residual=residual, seed=1)
    for norm in ("gn", "ln") for form in ("training", "deployed") for residual in (True, False)
) + tuple(Block(norm=norm, values="small", residual=False, form=form, seed=2)
    for norm in ("gn", "ln") for form in ("deployed", "unit")
) + (
    Block(size=(1, 1), form="deployed", residual=False, seed=3),
    Block(values="mean1000", form="unit", residual=False, seed=4),
    Block(channels=64, size=(28, 28), batch=1, seed=5),
    Block(channels=24, hidden=264, size=(17, 20), batch=1, residual=False, seed=6),
)  # fmt: skip
