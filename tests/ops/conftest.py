"""Fixtures of the tests of the ops."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """These tests use one thread, where they ask for nothing else."""
