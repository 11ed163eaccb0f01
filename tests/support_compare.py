"""Comparison of results that are not judged by the error-ratio rule, and the count of the ops that ran."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def outputs(value: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The results of a model that returns one or several."""
    return value if isinstance(value, tuple) else (value,)


def close(found: object, expected: object, tolerance: float = 2e-5) -> bool:
    """Whether float32 results agree as two correct implementations do; exactness has its own tests."""
    found, expected = outputs(found), outputs(expected)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        scale = max(1.0, theirs.double().abs().max().item()) if theirs.numel() else 1.0
        if not torch.allclose(mine.double(), theirs.double(), rtol=0, atol=tolerance * scale):
            return False
    return True


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """The same bits."""
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


class OpCounter(TorchDispatchMode):
    """Counts the engine's ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        if function.namespace == "riformer":
            self.calls[function._schema.name.removeprefix("riformer::")] += 1
        return function(*arguments, **(keywords or {}))
