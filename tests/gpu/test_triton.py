"""The Triton backend where there is no GPU: its kernels in Triton's interpreter, and how it says why it is unusable.

The tests in the interpreter run in processes of their own, as Triton reads TRITON_INTERPRET when it is first imported:
the conformance suite (`tests/conformance`) and those of `tests/gpu/interpreted`. What the compiler makes of the
kernels is in `test_triton_ahead.py`, what a GPU computes with them in `test_gpu.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support_paths import TESTS
from support_processes import check, started

import riformer_kernels
from riformer_kernels import BackendError, backends, ops
from riformer_kernels.backends import _devices, triton

INTERPRETED = TESTS / "gpu" / "interpreted"
RUNS = {
    "conformance": [TESTS / "conformance" / "test_conformance.py", "--target=interpreted"],
    "promises": [TESTS / "conformance" / "test_promises.py", "--target=interpreted"],
} | {file.stem: [file, "--target=interpreted"] for file in sorted(INTERPRETED.glob("interpreted_*.py"))}

ABSENT = """
import sys, importlib.util
sys.modules["triton"] = None
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
"""


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    pytest.importorskip("triton")
    with started(RUNS, tmp_path_factory.mktemp("interpreted"), TRITON_INTERPRET="1") as processes:
        yield processes


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNS)
def test_interpreted(running, name):
    check(*running[name])


def test_interpreted_files_are_found():
    assert {"interpreted_model", "interpreted_mutants", "interpreted_paths"} <= RUNS.keys()


# -------------------------------------------------------------------------------------------- without Triton or a GPU


def test_importing_the_package_imports_no_kernel():
    """Nor Triton, but that PyTorch itself imports where it is installed."""
    code = "import sys, riformer_kernels; print([name for name in sys.modules if 'backends.triton.' in name])"
    done = fresh(code)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_without_triton_the_package_and_its_cpu_path_work():
    code = ABSENT + (
        "import torch, riformer, riformer_kernels\n"
        "from riformer_kernels import backends\n"
        "print(backends.ALL['triton'].unusable())\n"
        "model = riformer.RIFormer({'layers': [1, 1, 1, 1], 'embed_dims': [8, 16, 24, 32]}, num_classes=4).eval()\n"
        "name = 'auto' if backends.ALL['cpu'].unusable() is None else 'reference'\n"
        "with riformer_kernels.patch(riformer.randomize_(model, 0), backend=name), torch.inference_mode():\n"
        "    print(tuple(model(torch.randn(1, 3, 64, 64)).shape))\n"
        "from riformer_kernels.backends import triton\n"
        "try:\n    triton.launcher('block')\nexcept riformer_kernels.BackendError as error:\n    print(error)\n"
    )
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    reason, shape, error = done.stdout.splitlines()[-3:]
    assert "pip install 'riformer-kernels[triton]'" in reason and shape == "(1, 4)"
    assert "riformer::block on a CUDA tensor" in error and "pip install" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_why():
    pytest.importorskip("triton")
    reason = triton.unusable()
    assert reason and ("built without CUDA" in reason or "no CUDA device" in reason)
    with pytest.raises(BackendError, match=r"triton.*(built without CUDA|no CUDA device)"):
        backends.choose("auto", torch.device("cuda"), torch.float32)
    with pytest.raises(BackendError, match="it serves cuda tensors"):
        backends.choose("triton", torch.device("cpu"), torch.float32)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(triton, "_no_triton", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"GPU {index}")
    monkeypatch.setattr(_devices, "capability", lambda index: capabilities[index])


def test_an_old_architecture_is_refused_by_name(monkeypatch):
    pretend_gpu(monkeypatch, (7, 5))
    with pytest.raises(BackendError, match=r"cuda:0 \(GPU 0\) has compute capability 7.5; the kernels need 8.0"):
        backends.choose("auto", torch.device("cuda", 0), torch.float16)


def test_of_two_gpus_the_old_one_is_refused_and_the_other_served(monkeypatch):
    pretend_gpu(monkeypatch, (9, 0), (7, 0))
    assert triton.unusable() is None and triton.BACKEND.detail() == "sm_90"
    assert backends.choose("auto", torch.device("cuda", 0), torch.bfloat16) is triton.BACKEND
    with pytest.raises(BackendError, match=r"cuda:1 .* compute capability 7.0"):
        backends.choose("auto", torch.device("cuda", 1), torch.bfloat16)
    with pytest.raises(BackendError, match="it serves float32, bfloat16, float16"):
        backends.choose("triton", torch.device("cuda", 0), torch.float64)


def test_without_a_c_compiler_it_is_unusable_and_says_so(monkeypatch):
    """Triton compiles a launcher for each kernel; without a compiler the first call would fail."""
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.delenv("CC", raising=False)
    found: set[str] = set()
    monkeypatch.setattr(triton.shutil, "which", lambda name: f"/bin/{name}" if name in found else None)
    assert "neither gcc nor clang was found; install one, or set CC" in triton.unusable()
    with pytest.raises(BackendError, match=r"triton: Triton needs a C compiler.*cuda: "):
        backends.choose("auto", torch.device("cuda", 0), torch.bfloat16)
    found.add("clang")
    assert triton.unusable() is None
    found.clear()
    monkeypatch.setenv("CC", "/opt/cc")
    assert triton.unusable() is None


def test_info_shows_the_backend_and_the_reason():
    from riformer_cli import info

    row = next(row for row in info.collect()["backends"] if row["name"] == "triton")
    assert row["devices"] == ["cuda"] and row["chosen_by_auto"]
    assert row["usable"] == (row["why_not"] is None) == torch.cuda.is_available()


def test_every_op_has_a_cuda_kernel():
    for name in ops.ALL:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"riformer::{name}", "CUDA"), name
    assert riformer_kernels.backends.ALL["triton"] is triton.BACKEND
