"""`setup.py`: which native libraries an installation builds, and the notes that say why one is not there."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support_paths import ROOT

setuptools = pytest.importorskip("setuptools")
FOLDER = Path("riformer_kernels") / "lib"


def build(target: Path, temporary: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", target, "--build-temp", temporary]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "RIFORMER_CPU": "off", **environment}
    )


def built(target: Path) -> dict[str, str]:
    """What lies in the package's folder, and the text of the notes."""
    return {
        path.name: path.read_text() if path.suffix == ".txt" else "" for path in sorted((target / FOLDER).iterdir())
    }


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RIFORMER_CUDA": "off"}, "the package was installed with RIFORMER_CUDA=off"),
        pytest.param(
            {"RIFORMER_CUDA": "auto"},
            f"PyTorch {torch.__version__}, which was installed at the time, has no CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA"),
        ),
        ({"CUDACXX": "/nowhere/nvcc"}, "nvcc was not found" if torch.version.cuda else "has no CUDA"),
    ],
    ids=["off", "auto", "unset"],
)
def test_a_note_says_why_not(tmp_path, environment, reason):
    done = build(tmp_path / "lib", tmp_path / "temporary", **environment)
    assert done.returncode == 0, done.stderr
    notes = built(tmp_path / "lib")
    assert notes["cpu_not_built.txt"] == "not built: the package was installed with RIFORMER_CPU=off\n"
    assert notes["cuda_not_built.txt"].startswith("not built: ") and reason in notes["cuda_not_built.txt"]
    assert len(notes) == 2


def test_on_without_nvcc_fails_and_names_the_way_out(tmp_path):
    done = build(tmp_path / "lib", tmp_path / "temporary", RIFORMER_CUDA="on", CUDACXX="/nowhere/nvcc")
    assert done.returncode != 0
    assert "the native CUDA library cannot be built: RIFORMER_CUDA=on, and nvcc was not found" in done.stderr
    assert "set RIFORMER_CUDA=off" in done.stderr


@pytest.mark.parametrize("kind", ["CPU", "CUDA"])
def test_a_switch_that_is_not_understood(tmp_path, kind):
    done = build(tmp_path / "lib", tmp_path / "temporary", **{f"RIFORMER_{kind}": "perhaps"})
    assert done.returncode != 0 and f"RIFORMER_{kind}='perhaps' is not understood, expected on, off" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_on_builds_the_library_beside_any_pytorch(tmp_path):
    """In the folder of `test_cuda_build.py`, which has compiled it."""
    done = build(tmp_path / "lib", ROOT / "build", RIFORMER_CUDA="on", CMAKE_BUILD_PARALLEL_LEVEL="2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert set(built(tmp_path / "lib")) == {"cpu_not_built.txt", "libriformer_cuda.so"}
    assert b"riformer_cuda_architectures" in (tmp_path / "lib" / FOLDER / "libriformer_cuda.so").read_bytes()


@pytest.mark.slow
def test_architectures_that_the_kernels_cannot_serve(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    done = build(tmp_path / "lib", tmp_path / "new", RIFORMER_CUDA="on", RIFORMER_CUDA_ARCHITECTURES="75;80")
    assert done.returncode != 0
    assert "RIFORMER_CUDA_ARCHITECTURES: '75', expected" in done.stderr.replace("\n  ", " ")


# ------------------------------------------------------------------------------------------------- what auto would do


@pytest.fixture
def script(monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def compiler(folder: Path, version: str) -> Path:
    """An nvcc that says which one it is, and does no more."""
    path = folder / "nvcc"
    path.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {version}, V{version}.1"\n')
    path.chmod(0o755)
    return path


def test_auto_builds_where_nvcc_and_a_cuda_pytorch_are(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDACXX", str(compiler(tmp_path, "13.0")))
    assert script["why_no_cuda"]("auto") is None and script["why_no_cuda"]("on") is None
    assert "RIFORMER_CUDA=off" in script["why_no_cuda"]("off")


def test_an_old_nvcc_is_a_reason(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDACXX", str(compiler(tmp_path, "11.8")))
    assert "is of CUDA 11.8, expected 12.5 or later; install the CUDA toolkit" in script["why_no_cuda"]("auto")
    with pytest.raises(SystemExit, match=r"is of CUDA 11\.8, expected 12\.5 or later\.\nTo install without"):
        script["why_no_cuda"]("on")


def test_nvcc_is_found_in_the_toolkit_of_cuda_home(script, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    expected = compiler(tmp_path / "bin", "13.0")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert script["nvcc"]() == str(expected)
