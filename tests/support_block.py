"""Cases of ``block`` and ``block_``: hard parameters, the eager form, golden, and the check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from support_cases import EPS, Expected, check_ratios, described, draws, like, seeds_of, tokens
from support_moments import check_moments
from support_norm import eager_norm

from riformer_kernels import numerics


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
    int8: bool = False

    @property
    def width(self) -> int:
        return self.hidden or 4 * self.channels

    @property
    def work(self) -> int:
        """Multiply-adds of one call."""
        return 2 * self.channels * self.width * self.size[0] * self.size[1] * self.batch

    def __str__(self) -> str:
        return described(self)


# The names of what follows x and moments, in the op's order.
PARAMETERS = tuple(argument.name for argument in torch.ops.riformer.block.default._schema.arguments)[2:]
# Those that a block of a model may lack.
OPTIONAL = ("fc1_bias", "fc2_bias", "layer_scale_2", "affine_bias")


def block_parameters(case: Block, seed: int) -> dict[str, Any]:
    """Hard parameters: layer scales of about a half, and nothing at its neutral value.

    A fresh model's layer scale of 1e-5 makes the block nearly the identity, which hides what is broken.
    """
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
        "int8": case.int8,
    }
    return found | dict.fromkeys(case.absent)


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
    w1, w2 = (p[name].reshape(*p[name].shape[:2], 1, 1) for name in ("fc1_weight", "fc2_weight"))
    branch = F.conv2d(F.gelu(F.conv2d(z, w1, p["fc1_bias"])), w2, p["fc2_bias"])
    if p["layer_scale_2"] is not None:
        branch = p["layer_scale_2"][:, None, None] * branch
    return y + branch if p["residual"] else branch


@lru_cache(maxsize=32)
@torch.no_grad()
def expected_block(case: Block) -> Expected:
    values = case.batch * case.channels * case.size[0] * case.size[1]
    arguments = [(tokens(case, s, case.channels), block_parameters(case, s)) for s in seeds_of(case, values)]
    golden = [eager_block(x.double().contiguous(), p) for x, p in arguments]
    return Expected(arguments, torch.cat([eager_block(x, p) for x, p in arguments]), torch.cat(golden))


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
