"""Fixtures of the tests on the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """These tests use one thread."""


@pytest.fixture(params=[80, 90], ids=lambda architecture: f"sm_{architecture}")
def architecture(request: pytest.FixtureRequest) -> Iterator[int]:
    """The compute capability of the emulated GPU, times ten."""
    from support_emulated import emulated

    with emulated(request.param):
        yield request.param
