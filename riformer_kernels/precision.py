"""How PyTorch is told to take float32 products on a GPU, and how eager is held to what the kernels do.

PyTorch has two interfaces to this, the older ``allow_tf32`` and the newer ``fp32_precision``. The older one raises an
error when it is read after the newer one was used in some combinations; the newer one can always be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

EXACT, TF32 = "ieee", "tf32"


def products_of_float32() -> str:
    """ "tf32" where PyTorch is told that TF32 will do for float32 products on a GPU, else "ieee"."""
    return TF32 if torch.backends.cuda.matmul.fp32_precision == TF32 else EXACT


@contextlib.contextmanager
def convolutions_like_products(device: torch.device) -> Iterator[None]:
    """Inside, PyTorch's convolutions on a GPU take float32 products as its matrix products do.

    By default they use TF32 and the matrix products, as our kernels, do not. What is compared with eager would then be
    held to an error a thousand times float32's.
    """
    wanted = products_of_float32()
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # a property of the module's class
    before = convolutions.fp32_precision
    if device.type != "cuda" or before == wanted:
        yield
        return
    convolutions.fp32_precision = wanted
    try:
        yield
    finally:
        convolutions.fp32_precision = before
