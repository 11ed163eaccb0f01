"""Options and fixtures that tests of several folders share.

``--backend=reference`` runs the contract tests without the native library. ``--target=emulated`` runs the conformance
suite, and the tests of the C++ bindings, against another implementation of the ops.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import support_target
import torch
from riformer.model import RIFormer
from riformer.randomize import randomize_
from support_compare import OpCounter
from support_cpu import selected
from support_models import TINY
from torch import nn

from riformer_kernels import backends
from riformer_kernels.machine import threads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="cpu", choices=["cpu", "reference"], help="backend of the contract tests")
    parser.addoption(
        "--target", action="append", default=[], choices=list(support_target.MODULES),
        help="implementation of the ops that the conformance suite runs against; may be given several times",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    support_target.choose(config.getoption("--target"))


# --------------------------------------------------------------------------------------------------------- the machine


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, where nothing else is asked for: with little work, threads only wait for each other."""
    with threads(1):
        yield


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that `support_cpu.per_isa` names is the one in use."""
    with selected(request.param) as name:
        yield name


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Eager's convolutions on a GPU use TF32 by default, which would be no measure of a float32 error."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Default dtype and grad mode are as a test found them."""
    yield
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[support_target.Target]:
    """A target, while it runs with one of its settings. Tests are parametrized with pairs of both."""
    found, setting = request.param
    if reason := found.why_not():
        pytest.skip(f"target {found}: {reason}")
    with setting.active():
        yield found


# ---------------------------------------------------------------------------------------------------- models, backends


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the backend under test. A missing native library is a failure, unless RIFORMER_CPU=off asked for that."""
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


@pytest.fixture
def count_ops(backend: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """``count_ops(function)`` calls it and returns how often each op of the engine ran, whichever backend is tested."""
    calls: Counter[str] = Counter()
    if backend == "reference":

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

    return count
