"""The error-ratio rule: an implementation is judged by eager PyTorch's own error, never by a fixed tolerance.

Golden: float64 on inputs and parameters that were first rounded to the tested dtype. Our error and eager's error in
that dtype are both taken against it, and four figures are compared as ratios (ours / eager's), with no additive term:
the largest error, the root mean square (RMS), the RMS of the worst channel and the RMS of the worst position.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from .dtypes import name_of


@dataclass(frozen=True)
class ErrorFigures:
    """Absolute errors of a tensor against golden: largest, RMS, RMS of the worst channel and of the worst position."""

    max: float
    rms: float
    channel: float
    position: float


@dataclass(frozen=True)
class ErrorRatios:
    """Ours over eager's, figure by figure, with the limits that the rule sets for the dtype."""

    max: float
    rms: float
    channel: float
    position: float
    limits: ErrorFigures
    ours: ErrorFigures
    eager: ErrorFigures

    @property
    def passed(self) -> bool:
        return not self.exceeded

    @property
    def exceeded(self) -> list[str]:
        """The figures above their limit, as text. A NaN ratio is above every limit."""
        found = []
        for figure in ("max", "rms", "channel", "position"):
            ratio, limit = getattr(self, figure), getattr(self.limits, figure)
            if not ratio <= limit:
                found.append(f"{figure} {ratio:.3g}x (limit {limit:g}x)")
        return found

    def as_dict(self) -> dict:
        return {**asdict(self), "passed": self.passed}


# How many times eager's RMS ours may be. Eager's own memory formats differ by 1.7 to 2x in float32.
_RMS_LIMITS = {torch.float32: 2.0, torch.bfloat16: 1.25, torch.float16: 1.25, torch.float64: 1.25}
# int8 products, against eager bfloat16. Measured at the 96 x 96 pixels of verification, over S12, M36 and tiny
# models: RMS at most 1.43 (features), 1.43 (logits, which average nine positions there; at 224 x 224 it is
# 0.8) and 3.6 (branches, where there is no residual whose rounding eager's error would be). max, channel and position
# were at most 2.1, 1.7 and 1.6; 1.7, 1.5 and 1.5; 4.5, 3.4 and 4.7.
_INT8_LIMITS = {
    "features": ErrorFigures(max=3.0, rms=1.5, channel=2.0, position=3.0),
    "logits": ErrorFigures(max=2.0, rms=1.5, channel=2.0, position=2.0),
    "branch": ErrorFigures(max=6.0, rms=4.5, channel=4.5, position=6.0),
}


def limits_for(dtype: torch.dtype, what: str = "features") -> ErrorFigures:
    """The limits for a dtype. Those for int8 depend on ``what`` is compared: "features", "logits" or a "branch".

    Raises:
        ValueError: none are set for it.
    """
    if dtype == torch.int8:
        return _INT8_LIMITS[what]
    if dtype not in _RMS_LIMITS:
        raise ValueError(f"the error-ratio rule has no limits for {name_of(dtype)}; add them to numerics")
    return ErrorFigures(max=2.0, rms=_RMS_LIMITS[dtype], channel=2.0, position=3.0)


def figures(value: torch.Tensor, golden: torch.Tensor) -> ErrorFigures:
    """Errors of ``value`` against ``golden`` (float64, same shape): [B, C, ...] with channels second, or [B, C]."""
    if value.shape != golden.shape:
        raise ValueError(f"shapes differ: {tuple(value.shape)} against golden {tuple(golden.shape)}")
    if value.numel() == 0:
        return ErrorFigures(0.0, 0.0, 0.0, 0.0)
    error = (value.detach().to(torch.float64) - golden.to(torch.float64)).reshape(value.shape[0], value.shape[1], -1)
    square = error.square()
    return ErrorFigures(
        max=error.abs().max().item(),
        rms=square.mean().sqrt().item(),
        channel=square.mean(dim=(0, 2)).max().sqrt().item(),
        position=square.mean(dim=1).max().sqrt().item(),
    )


def _ratio(ours: float, eager: float) -> float:
    if ours == 0.0:
        return 0.0
    return ours / eager if eager > 0.0 else float("inf")


def compare(
    ours: torch.Tensor,
    eager: torch.Tensor,
    golden: torch.Tensor,
    dtype: torch.dtype | None = None,
    limits: ErrorFigures | None = None,
) -> ErrorRatios:
    """The four ratios of ``ours`` against ``eager``, both measured against ``golden``.

    Args:
        ours, eager: results of the same shape.
        golden: the same in float64.
        dtype: the dtype whose limits apply; default ``eager``'s.
        limits: those that apply in place of a dtype's.
    """
    mine, theirs = figures(ours, golden), figures(eager, golden)
    return ErrorRatios(
        max=_ratio(mine.max, theirs.max),
        rms=_ratio(mine.rms, theirs.rms),
        channel=_ratio(mine.channel, theirs.channel),
        position=_ratio(mine.position, theirs.position),
        limits=limits or limits_for(dtype or eager.dtype),
        ours=mine,
        eager=theirs,
    )
