"""The check of int8 blocks.

What the kernels must compute is stated in plain PyTorch (`riformer_kernels.quantise`), with errors that are the
scheme's own. So the kernels are compared with the statement, and what they differ by is measured by the statement's
own error against float64: a value that float32 rounds to the other side of a half is one step of a byte off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support_block import PARAMETERS, Block, block_parameters, eager_block
from support_cases import seeds_of, tokens

from riformer_kernels import algebra
from riformer_kernels.ops import block

# Of the statement's own error. Measured over all instruction sets and cases: at most 0.18 and 0.21; each fault of
# test_block_int8.py is above one of them on some case.
CLOSE = {"values": 0.25, "means": 0.5}


def stated(x: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """The block in plain PyTorch, in float32 throughout."""
    values = [v.float() if isinstance(v, torch.Tensor) else v for v in (parameters[name] for name in PARAMETERS)]
    moments = None if parameters["per_position"] else algebra.moments_of(x.float())
    return block.reference(x.float(), moments, *values)[0]


def distances(run: Callable[..., Any], case: Block) -> dict[str, float]:
    """How far ``run`` is from the statement, in the statement's own error: all values, and their means over the
    positions, which is where errors of the corrections show."""
    assert case.dtype == torch.float32 and case.int8, "rounding to narrow tokens would hide what is compared"
    off: dict[str, list[torch.Tensor]] = {"values": [], "means": []}
    own: dict[str, list[torch.Tensor]] = {"values": [], "means": []}
    for seed in seeds_of(case, case.batch * case.channels * case.size[0] * case.size[1]):
        x, parameters = tokens(case, seed, case.channels), block_parameters(case, seed)
        statement = stated(x, parameters).double()
        errors = run(x, parameters)[0].double() - statement, statement - eager_block(x.double(), parameters)
        for found, error in zip((off, own), errors, strict=True):
            found["values"].append(error.flatten())
            found["means"].append(error.mean(dim=(2, 3)).flatten())
    return {kind: (size(off[kind]) / size(own[kind])).item() for kind in off}


def size(errors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(errors).square().mean().sqrt()


def check_int8(run: Callable[..., Any], case: Block, label: str = "") -> None:
    for kind, found in distances(run, case).items():
        assert found <= CLOSE[kind], f"{label}: {case}: {kind} differ by {found:.2f} of the scheme's own error"
