"""What the CUDA kernels and their emulator take for granted about matrix instructions, against CuTe.

A kernel and an emulator written by the same hand may share a mistake. CuTe is NVIDIA's own account of who holds which
element, of the swizzle and of descriptors.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def includes() -> list[str]:
    """CuTe's headers and the CUDA toolkit's, which they include."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None:
        pytest.skip("CuTe's headers are not installed (pip install nvidia-cutlass)")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed; CuTe includes the toolkit's headers")
    toolkit = Path(nvcc).resolve().parent.parent / "include"
    if not (toolkit / "cuda_runtime.h").exists():  # nvcc may be a script that starts the real one
        found = [path for path in Path("/usr/local").glob("cuda*/include") if (path / "cuda_runtime.h").exists()]
        if not found:
            pytest.skip(f"the CUDA toolkit's headers are not beside {nvcc}")
        toolkit = found[0]
    cutlass = Path(next(iter(spec.submodule_search_locations))) / "source" / "include"
    return [f"-I{cutlass}", f"-I{toolkit}", f"-I{toolkit / 'cccl'}"]


@pytest.mark.parametrize("swizzle_of_128_bytes", ["0x70", "0x60"])
def test_layouts_are_those_of_cute(tmp_path, swizzle_of_128_bytes):
    """With another swizzle in hopper.h the comparison finds that they differ."""
    right = swizzle_of_128_bytes == "0x70"
    for folder in ("cuda", "emulator", "common"):
        shutil.copytree(ROOT / "csrc" / folder, tmp_path / "csrc" / folder)
    header = tmp_path / "csrc" / "cuda" / "hopper.h"
    text = header.read_text()
    assert text.count("offset >> 3 & 0x70") == 1
    header.write_text(text.replace("offset >> 3 & 0x70", f"offset >> 3 & {swizzle_of_128_bytes}"))
    source = tmp_path / "tests" / "emulated" / "layouts.cpp"
    source.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "emulated" / "layouts.cpp", source)
    program = tmp_path / "layouts"
    emulator = [str(tmp_path / "csrc" / "emulator" / name) for name in ("emulator.cpp", "ampere.cpp", "hopper.cpp")]
    built = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-w", *includes(), str(source), *emulator, "-o", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    found = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert (found.returncode == 0) == right, found.stdout
    assert found.stdout.endswith(" disagreements\n"), found.stdout + found.stderr
