"""The check of moments."""

from __future__ import annotations

import torch

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
