"""The dtypes of tokens that the native kernels serve, in one place.

A backend that serves fewer of them, or more, says so itself (``Backend.dtypes``).
"""

from __future__ import annotations

import torch

# In the order of csrc/common/dtypes.h: a dtype's place is its number in the native libraries.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    """The dtype as people write it: "float32"."""
    return str(dtype).removeprefix("torch.")


def number_of(dtype: torch.dtype) -> int:
    """The number of a dtype in the native libraries.

    Raises:
        ValueError: it has none.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{name_of(dtype)} has no number in the native libraries; expected {ANY}")
    return DTYPES.index(dtype)


def token_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the tokens between the ops: bfloat16 for int8, whose scales belong to a product and not to a tensor.

    A float32 model's too: with float32 tokens S12's features have 0.85x of the error, and the convolutions take three
    times as long.
    """
    return torch.bfloat16 if compute_dtype == torch.int8 else compute_dtype


NAMES = tuple(map(name_of, DTYPES))
ANY = f"{', '.join(NAMES[:-1])} or {NAMES[-1]}"  # for messages
