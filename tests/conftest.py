"""Fixtures shared by the tests. ``--backend=reference`` runs the contract tests without the native library."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from riformer.model import RIFormer
from riformer.randomize import randomize_
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from riformer_kernels import backends

TINY = {"layers": [2, 2, 2, 2], "embed_dims": [16, 32, 48, 64]}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="cpu", choices=["cpu", "reference"], help="backend of the contract tests")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the backend under test. A native library that is missing is a failure, unless RIFORMER_CPU=off asked for it."""
    name = request.config.getoption("--backend")
    reason = backends.ALL[name].unusable()
    if reason and os.environ.get("RIFORMER_CPU") == "off":
        pytest.skip(f"RIFORMER_CPU=off: {reason}")
    assert reason is None, f"backend {name!r}: {reason}"
    return name


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """Builds a tiny RIFormer with hard parameters, in evaluation mode; ``seed``, ``arch`` and RIFormer's arguments."""

    def build(
        seed: int = 0, arch: dict | str = TINY, dtype: torch.dtype = torch.float32, **options: object
    ) -> nn.Module:
        return randomize_(RIFormer(arch, **options), seed).to(dtype).eval()

    return build


@pytest.fixture
def model(make: Callable[..., nn.Module]) -> nn.Module:
    """Backbone and classifier in one, training-time form."""
    return make(num_classes=10)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn((2, 3, 65, 49), generator=torch.Generator().manual_seed(0))


class OpCounter(TorchDispatchMode):
    """Counts the engine's ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        if function.namespace == "riformer":
            self.calls[function._schema.name.removeprefix("riformer::")] += 1
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def count_ops(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Counter[str]]]:
    """``count_ops(function)`` calls it and returns how often each op of the engine ran, whichever backend is tested."""
    calls: Counter[str] = Counter()
    if backend == "reference":
        import dataclasses

        def counted(name: str, function: Callable) -> Callable:
            def call(*arguments):
                calls[name] += 1
                return function(*arguments)

            return call

        plain = backends.ALL[backend]
        wrapped = {name: counted(name, function) for name, function in plain.ops.items()}
        monkeypatch.setitem(backends.ALL, backend, dataclasses.replace(plain, ops=wrapped))

    def count(function: Callable[[], object]) -> Counter[str]:
        calls.clear()
        with OpCounter() as counter:
            function()
        return calls + counter.calls

    yield count


def outputs(value: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def close(found: object, expected: object, tolerance: float = 2e-5) -> bool:
    """Whether float32 results agree as two correct implementations do; exactness has its own tests."""
    found, expected = outputs(found), outputs(expected)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        scale = max(1.0, theirs.double().abs().max().item()) if theirs.numel() else 1.0
        if not torch.allclose(mine.double(), theirs.double(), rtol=0, atol=tolerance * scale):
            return False
    return True


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Autocast, default dtype and grad mode are as a test found them."""
    yield
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
