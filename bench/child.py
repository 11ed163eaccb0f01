"""Starting another Python that can import what this one can."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
"""The folder of the benchmarks."""


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a child process that imports what this one can, with ``extra`` on top."""
    path = os.pathsep.join(dict.fromkeys([str(HERE), *(entry for entry in sys.path if entry)]))
    return {**os.environ, "PYTHONPATH": path, **(extra or {})}
