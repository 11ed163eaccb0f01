"""Runs in a process of its own, see `tests/test_triton.py`: Triton decides at its import whether it interprets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("these tests need TRITON_INTERPRET=1 from the start; run tests/test_triton.py")
