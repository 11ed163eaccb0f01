"""The plain arithmetic of the CUDA kernels, over everything that it can be asked: GELU, how rows and tiles are divided,
and who holds which element of a matrix instruction.

The programs are `tests/gpu/emulated/*.cpp`; they include the kernels' own headers.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from support_paths import ROOT

EMULATOR = ("emulator.cpp", "ampere.cpp", "hopper.cpp")


def built(source: str, folder: Path, *options: str, root: Path = ROOT) -> Path:
    """A program of `tests/gpu/emulated` with the emulator of ``root``."""
    program = folder / source.removesuffix(".cpp")
    files = [root / "tests" / "gpu" / "emulated" / source, *(root / "csrc" / "emulator" / name for name in EMULATOR)]
    done = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-DRIFORMER_EMULATED", *options, *map(str, files), "-o", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return program


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    return built("arithmetic.cpp", tmp_path_factory.mktemp("arithmetic"))


def test_rows_tiles_and_turns(arithmetic):
    found = subprocess.run([str(arithmetic), "slots"], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and found.stdout == "0 failures\n", found.stdout + found.stderr


def test_every_launcher_refuses_an_unknown_dtype(arithmetic):
    found = subprocess.run([str(arithmetic), "dtypes"], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and found.stdout == "0 failures\n", found.stdout + found.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
@pytest.mark.parametrize("sm_90", [False, True])
def test_a_library_without_sm_90_needs_nothing_of_it(tmp_path, sm_90):
    """A library that is built without 90a has no block_sm90.cu, and has to link without it."""
    unit = tmp_path / "block.o"
    options = ["-std=c++17", "-DRIFORMER_EMULATED", *(["-DRIFORMER_SM90"] if sm_90 else [])]
    source = ROOT / "csrc" / "cuda" / "block.cu"
    subprocess.run(["g++", *options, "-x", "c++", "-c", source, "-o", unit], check=True)
    needed = subprocess.run(["nm", "-C", "--undefined-only", unit], check=True, capture_output=True, text=True).stdout
    assert ("describe_block_sm90" in needed) == ("launch_block_sm90" in needed) == sm_90, needed


# ---------------------------------------------------------------------------------------------------------------- GELU


def gelu_of_kernels(arithmetic: Path, x: numpy.ndarray) -> numpy.ndarray:
    """Those of all bfloat16 patterns, of all float16 patterns, and of float32 ``x``."""
    done = subprocess.run(
        [str(arithmetic), "gelu"], input=x.astype("float32").tobytes(), capture_output=True, timeout=60
    )
    assert done.returncode == 0
    return numpy.frombuffer(done.stdout, dtype="float32")


def patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def exact(x: torch.Tensor) -> torch.Tensor:
    """x Phi(x) in float64, without the cancellation of 1 + erf."""
    wide = x.double()
    return wide * torch.special.erfc(-wide / 2**0.5) / 2


def test_gelu_of_every_16_bit_value(arithmetic):
    found = torch.from_numpy(gelu_of_kernels(arithmetic, numpy.empty(0)).copy())
    for dtype, part in ((torch.bfloat16, found[:65536]), (torch.float16, found[65536:])):
        x = patterns(dtype)
        assert part[x.isnan()].isnan().all()
        finite = x.isfinite()
        x, y = x[finite], part[finite].double()
        error = (y - exact(x)).abs()
        # 2.5e-5 in exact arithmetic (csrc/common/gelu.h). float32 adds up to 1e-5 at -4.4, where 1/2 - 1/2 leaves a
        # rounding error, and beyond that the error grows with x.
        inside = x.abs() <= 4.4
        assert error[inside].max().item() <= 3.5e-5
        outside = ~inside
        assert (error[outside] <= 6e-6 * x[outside].double().abs()).all()
        assert ((y >= 0) | (x < 0)).all() and (y[x == 0] == 0).all()


def test_gelu_of_float32(arithmetic):
    x = numpy.concatenate([numpy.linspace(-12, 12, 200_001), numpy.geomspace(1e-30, 1e30, 20_001)]).astype("float32")
    x = numpy.concatenate([x, -x[200_001:]])
    found = torch.from_numpy(gelu_of_kernels(arithmetic, x).copy())[2 * 65536 :].double()
    wanted = exact(torch.from_numpy(x))
    # One rounding each of erf, of the sum and of the product; 1 + erf cancels below -3, which leaves an absolute error.
    error = (found - wanted).abs()
    assert (error <= 2.0**-22 * wanted.abs() + 2.0**-24 * torch.from_numpy(x).double().abs()).all()


# ------------------------------------------------------------------------------------------------- matrix instructions


def test_the_products_are_those_of_their_generator():
    folder = ROOT / "csrc" / "cuda"
    made = subprocess.run([sys.executable, folder / "wgmma.py"], capture_output=True, text=True, check=True).stdout
    assert made == (folder / "wgmma.h").read_text()


def includes() -> list[str]:
    """CuTe's headers and the CUDA toolkit's, which they include."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None:
        pytest.skip("CuTe's headers are not installed (pip install nvidia-cutlass)")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed; CuTe includes the toolkit's headers")
    # nvcc may be a script that starts the real one.
    toolkits = [Path(nvcc).resolve().parent.parent / "include", *sorted(Path("/usr/local").glob("cuda*/include"))]
    toolkit = next((path for path in toolkits if (path / "cuda_runtime.h").exists()), None)
    if toolkit is None:
        pytest.skip(f"the CUDA toolkit's headers are not beside {nvcc}")
    cutlass = Path(next(iter(spec.submodule_search_locations))) / "source" / "include"
    return ["-w", f"-I{cutlass}", f"-I{toolkit}", f"-I{toolkit / 'cccl'}"]


@pytest.mark.parametrize("mask", ["0x70", "0x60"])
def test_layouts_are_those_of_cute(tmp_path, mask):
    """A kernel and an emulator written by the same hand may share a mistake; CuTe is NVIDIA's own account of who holds
    which element, of the swizzle and of descriptors. With another swizzle in hopper.h it has to disagree."""
    for folder in ("cuda", "emulator", "common"):
        shutil.copytree(ROOT / "csrc" / folder, tmp_path / "csrc" / folder)
    header = tmp_path / "csrc" / "cuda" / "hopper.h"
    text = header.read_text()
    assert text.count("offset >> 3 & 0x70") == 1
    header.write_text(text.replace("offset >> 3 & 0x70", f"offset >> 3 & {mask}"))
    (tmp_path / "tests" / "gpu" / "emulated").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "gpu" / "emulated" / "layouts.cpp", tmp_path / "tests" / "gpu" / "emulated")
    found = subprocess.run(
        [str(built("layouts.cpp", tmp_path, *includes(), root=tmp_path))], capture_output=True, text=True, timeout=120
    )
    assert (found.returncode == 0) == (mask == "0x70"), found.stdout
    assert found.stdout.endswith(" disagreements\n"), found.stdout + found.stderr
