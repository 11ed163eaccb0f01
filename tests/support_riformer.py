"""What the tests of the reference implementation share."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Same names, same bits."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def nested(state_dict: Mapping[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    """The names as wrappers would have them, outermost first."""
    return {"".join(prefixes) + name: tensor for name, tensor in state_dict.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest value."""
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
