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


NAMES = tuple(map(name_of, DTYPES))
ANY = f"{', '.join(NAMES[:-1])} or {NAMES[-1]}"  # for messages
