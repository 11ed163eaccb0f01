"""Memory around a tensor that nobody may read or write."""

from __future__ import annotations

import torch

GUARD = 256  # elements on both sides; a multiple of what kernels may want a tensor to be aligned to


def surrounded(x: object) -> object:
    """A tensor in the layout of ``x`` with NaN on both sides. What is no tensor stays as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    buffer = x.new_full((x.numel() + 2 * GUARD,), float("nan"))
    inner = buffer.as_strided(x.shape, x.stride(), GUARD)
    inner.copy_(x)
    return inner


def check_surroundings(x: torch.Tensor) -> None:
    """``x``, which `surrounded` made, still has NaN on both sides."""
    buffer = x.as_strided((x.numel() + 2 * GUARD,), (1,), 0)
    assert buffer[:GUARD].isnan().all() and buffer[GUARD + x.numel() :].isnan().all(), "written outside of a tensor"
