"""The GPU does the arithmetic that the emulator does: nvcc joins no product and sum that the kernels keep apart."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support_paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]

ARITHMETIC = ("--fmad", "-fmad", "--use_fast_math", "-use_fast_math", "-O")
SOURCE = """
__global__ void apart(float* x) { x[0] = x[1] * x[2] + x[3]; }
__global__ void joined(float* x) { x[0] = __fmaf_rn(x[1], x[2], x[3]); }
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """How every file of the CUDA library is compiled by nvcc, by its name."""
    folder = tmp_path_factory.mktemp("configured")
    torch_root = Path(torch.__file__).parent
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DTORCH_ROOT={torch_root}", "-DRIFORMER_CUDA=ON",
         "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"],
        check=True, capture_output=True,
    )  # fmt: skip
    found = json.loads((folder / "compile_commands.json").read_text())
    return {Path(row["file"]).name: shlex.split(row["command"]) for row in found if row["file"].endswith(".cu")}


def test_a_product_and_a_sum_stay_apart(commands, tmp_path):
    assert commands.keys() == {"ops.cu", "block.cu", "block_sm80.cu", "block_sm90.cu"}
    source, target = tmp_path / "sum.cu", tmp_path / "sum.ptx"
    source.write_text(SOURCE)
    for name, command in commands.items():
        kept = [
            word for word in command if word.startswith(("--fmad", "-fmad", "--use_fast_math", "-use_fast_math", "-O"))
        ]
        subprocess.run([command[0], "-ptx", "-arch=compute_90", *kept, source, "-o", target], check=True)
        apart, joined = target.read_text().split(".entry")[1:]
        apart, joined = sorted((apart, joined), key=lambda text: "joined" in text.partition("(")[0])
        assert "mul.rn.f32" in apart and "add.rn.f32" in apart and "fma" not in apart, name
        assert "fma.rn.f32" in joined, name
