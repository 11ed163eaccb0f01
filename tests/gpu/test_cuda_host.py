"""What the host side of the CUDA library does around a launch, with stand-ins for the CUDA runtime's functions."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from support_paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]


def test_shared_memory_is_allowed_once_for_each_kernel_and_gpu(tmp_path):
    """If each launch set its own size, a launch by another host thread could find less than it needs."""
    program, here = tmp_path / "shared_memory", ROOT / "tests" / "gpu"
    options = ["-std=c++17", "-arch=compute_90", "--expt-relaxed-constexpr", "-cudart=none", f"-I{ROOT / 'csrc/cuda'}"]
    sources = [here / "shared_memory.cu", here / "runtime_stand_in.cpp"]
    subprocess.run(["nvcc", *options, *sources, "-o", program], check=True, capture_output=True, text=True)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "6 calls, 0 wrong\n", "three kernels on two GPUs, and the most that a GPU gives"
