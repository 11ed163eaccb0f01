"""The C++ compiler, for tests of what does and what does not compile."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest


def compiled(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the C++17 compiler with those arguments."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++17 compiler")
    return subprocess.run([*compiler, "-std=c++17", *map(str, arguments)], capture_output=True, text=True)
