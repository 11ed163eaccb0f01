"""Fixtures of the conformance suite."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """It uses one thread, where a test asks for nothing else."""


@pytest.fixture(autouse=True)
def _exact_float32(exact_float32: None) -> None:
    """Targets on a GPU are judged by exact float32."""
