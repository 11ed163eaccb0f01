"""Builds of the native code that no installation has: the CUDA library where there is no CUDA build of torch, and the
CUDA kernels on the emulator. They are kept in `build/`, so that nothing is compiled twice."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support_paths import ROOT

JOBS = "2"  # the kernels' templates take a gigabyte each


def tool(name: str) -> str:
    """A build tool, from this environment before the machine's own."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    return found


def build(folder: str, target: str, *options: str, objection: Callable[[str], object] = lambda output: None) -> Path:
    """`target` of CMakeLists.txt, built in `build/<folder>`; the library. Where it is up to date that takes a second.
    ``objection`` to what the compilers said, where it returns one, is a failure, and the next build begins anew."""
    path = ROOT / "build" / folder
    path.mkdir(parents=True, exist_ok=True)
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DTORCH_ROOT={Path(torch.__file__).resolve().parent}", *options,
    ]  # fmt: skip
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": JOBS} | os.environ
    with (path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at once
        for command in (configure, [tool("cmake"), "--build", str(path), "--target", target]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            said = f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
            assert done.returncode == 0, said
            if found := objection(done.stdout):
                subprocess.run([tool("cmake"), "--build", str(path), "--target", "clean"], env=environment, check=True)
                pytest.fail(f"{found}\n{said}")
    return path / f"lib{target}.so"
