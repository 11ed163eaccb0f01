"""Plain PyTorch: the ops' own references. Any device, any floating dtype; slow, and only on request."""

from __future__ import annotations

import torch

from .. import ops
from ._backend import Backend

BACKEND = Backend(
    name="reference",
    multiple=1,
    automatic=False,
    devices=(),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    unusable=lambda: None,
    detail=lambda: "plain PyTorch",
    ops={name: op.reference for name, op in ops.ALL.items()},
)
