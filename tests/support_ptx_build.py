"""The PTX of the CUDA kernels, and their host code linked against a fake CUDA runtime, both made by nvcc.

They are kept in `build/ptx`, so that nothing is compiled twice. No machine code is made, which would take minutes:
what is run is the PTX.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support_native import JOBS
from support_paths import ROOT, TESTS

CUDA = ROOT / "csrc" / "cuda"
HOST = TESTS / "support_ptx" / "host"
OUT = ROOT / "build" / "ptx"
# Translation units and the architecture that csrc/cuda/CMakeLists.txt compiles them for.
UNITS = {"ops": "compute_80", "block": "compute_80", "block_sm80": "compute_80", "block_sm90": "compute_90a"}
# CMake's own for a release build of a shared library. What the project adds is read where it stands.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DRIFORMER_SM90")
OPTIONS = re.compile(r"target_compile_options\(\$\{target\} PRIVATE ([^)]*)\)")
LIBRARY = "libriformer_ptx.so"
NO_NVCC = "nvcc is not installed, which compiles the CUDA kernels to PTX"


def flags() -> tuple[str, ...]:
    """Those of csrc/cuda/CMakeLists.txt for every kernel."""
    found = OPTIONS.findall((CUDA / "CMakeLists.txt").read_text())
    assert len(found) == 1, f"csrc/cuda/CMakeLists.txt gives options to every kernel in {len(found)} places"
    return (*FLAGS, *found[0].split())


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def _state(nvcc: str) -> str:
    """What the results depend on."""
    found = hashlib.sha256(repr((flags(), UNITS)).encode())
    found.update(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    for path in sorted((*CUDA.iterdir(), *(ROOT / "csrc" / "common").iterdir(), *HOST.iterdir())):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _unit(nvcc: str, name: str) -> None:
    """One run of nvcc makes the host's object and, kept beside it, the PTX."""
    architecture, kept = UNITS[name], OUT / f"keep-{name}"
    kept.mkdir(exist_ok=True)
    generate = f"-gencode=arch={architecture},code={architecture}"
    _run([nvcc, *flags(), generate, "--keep", "--keep-dir", kept, "-c", CUDA / f"{name}.cu", "-o", OUT / f"{name}.o"])
    shutil.move(kept / f"{name}.ptx", OUT / f"{name}.ptx")
    shutil.rmtree(kept)


def built() -> tuple[Path, list[Path]]:
    """The library of the host code, and the files of PTX. Skips the test where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip(NO_NVCC)
    OUT.mkdir(parents=True, exist_ok=True)
    stamp = OUT / "state"
    with (OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at once
        state = _state(nvcc)
        if not stamp.exists() or stamp.read_text() != state:
            stamp.unlink(missing_ok=True)
            with ThreadPoolExecutor(int(JOBS)) as pool:
                list(pool.map(lambda name: _unit(nvcc, name), sorted(UNITS, reverse=True)))  # the longest first
            objects = [OUT / f"{name}.o" for name in UNITS]
            sources = sorted(HOST.glob("*.cpp"))
            _run([nvcc, "-std=c++17", "-shared", "-cudart=none", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CUDA}",
                  *sources, *objects, "-Xlinker=--no-undefined", "-o", OUT / LIBRARY])  # fmt: skip
            stamp.write_text(state)
    return OUT / LIBRARY, [OUT / f"{name}.ptx" for name in UNITS]
