"""``moments``: the statistics pass, for tensors that no kernel of the engine wrote."""

from __future__ import annotations

import torch

from .. import algebra
from ._library import Op, working_dtype

SCHEMA = "(Tensor x) -> Tensor"


def reference(x: torch.Tensor) -> torch.Tensor:
    """Moments [B, 2, C] (mean, centred sum of squares) of ``x`` [B, C, H, W]; float32, or float64 for float64."""
    return algebra.moments_of(x.to(working_dtype(x.dtype)))


def fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], 2, x.shape[1]), dtype=working_dtype(x.dtype))


OP = Op("moments", SCHEMA, reference=reference, fake=fake)
