"""Plain PyTorch: the ops' own references. Any device, any floating dtype; slow, and only on request."""

from __future__ import annotations

import torch

from .. import ops
from ..dtypes import DTYPES
from ._backend import Backend

BACKEND = Backend(
    int8=True,
    name="reference",
    multiple=1,
    automatic=False,
    devices=(),
    dtypes=(*DTYPES, torch.float64),
    unusable=lambda: None,
    detail=lambda: "plain PyTorch",
    ops={name: op.reference for name, op in ops.ALL.items()},
)
