"""The CUDA backend where there is no GPU: its kernels on the emulator, why it is unusable, and how it is chosen.

The tests on the emulator run in processes of their own: the conformance suite (`tests/conformance`), the tests of the
bindings (`tests/ops`), and those of `tests/gpu/emulated`. What the compiler makes of the kernels is in
`test_cuda_build.py`, what a GPU computes with them in `test_gpu.py`.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from riformer_cli import info
from support_paths import TESTS
from support_processes import check, started

import riformer_kernels
from riformer_kernels import BackendError, backends, ops
from riformer_kernels.backends import _devices, cuda, triton

EMULATED = TESTS / "gpu" / "emulated"
# The conformance suite in two halves, the tests of all C++ bindings, and what only these kernels have.
RUNS = {
    "conformance": [TESTS / "conformance" / "test_conformance.py", "--target=emulated"],
    "promises": [TESTS / "conformance" / "test_promises.py", "--target=emulated"],
    "bindings": [TESTS / "ops" / "test_errors.py", TESTS / "ops" / "test_opcheck.py", "--target=emulated"],
} | {file.stem: [file, "--target=emulated"] for file in sorted(EMULATED.glob("emulated_*.py"))}
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with started(RUNS, tmp_path_factory.mktemp("emulated")) as processes:
        yield processes


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first of them compiles the kernels
@pytest.mark.parametrize("name", RUNS)
def test_emulated(running, name):
    check(*running[name])


def test_emulated_files_are_found():
    expected = {"emulated_contract", "emulated_mutants", "emulated_paths", "emulated_promises"}
    assert expected <= RUNS.keys()


# ---------------------------------------------------------------------------------------------------------- namespaces


def test_every_op_is_in_both_namespaces_with_one_schema():
    for name in ops.ALL:
        found = {
            str(getattr(getattr(torch.ops, space), name).default._schema) for space in ("riformer", "riformer_cuda")
        }
        assert len(found) == 2 and len({schema.split("::")[1] for schema in found}) == 1
        assert cuda.BACKEND.ops[name] is getattr(torch.ops.riformer_cuda, name).default
        assert triton.BACKEND.ops[name] is getattr(torch.ops.riformer, name).default


def test_no_kernel_serves_another_namespace():
    """An op has room for one kernel for each dispatch key. Triton's CUDA kernels must not be replaced."""
    for name in ops.ALL:
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"riformer_cuda::{name}", "CPU"), name
        built = cuda._load() is None
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"riformer_cuda::{name}", "CUDA") == built, name


def test_the_fakes_serve_shapes_without_the_library():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 17, 20, device="cuda")
        out, moments = torch.ops.riformer_cuda.embed(x, x.new_empty(16, 3, 3, 3), None, 2, 1, torch.bfloat16, True)
    assert out.shape == (2, 16, 9, 10) and out.is_contiguous(memory_format=torch.channels_last)
    assert moments.shape == (2, 2, 16) and moments.dtype == torch.float32


def test_a_tensor_on_the_cpu_is_refused_by_pytorch():
    with pytest.raises(NotImplementedError, match="riformer_cuda::moments"):
        torch.ops.riformer_cuda.moments(torch.ones(1, 8, 2, 2))


# ------------------------------------------------------------------------------------------------------------- reasons


@pytest.fixture
def fresh():
    """Answers that are kept from earlier questions are forgotten before and after the test."""
    cuda._load.cache_clear()
    yield
    cuda._load.cache_clear()


def test_not_built_says_why(monkeypatch, tmp_path, fresh):
    note = tmp_path / "cuda_not_built.txt"
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "libriformer_cuda.so")
    monkeypatch.setattr(cuda, "BUILD_NOTE", note)
    assert "libriformer_cuda.so is missing" in cuda.unusable() and "nvcc" in cuda.unusable()
    cuda._load.cache_clear()
    note.write_text("not built: nvcc was not found\n")
    assert cuda.unusable() == "not built: nvcc was not found"
    with pytest.raises(BackendError, match=r"backend 'cuda' cannot serve .*: not built: nvcc was not found"):
        backends.choose("cuda", GPU, torch.float32)
    row = next(row for row in info.collect()["backends"] if row["name"] == "cuda")
    assert (row["built"], row["usable"], row["architectures"]) == (False, False, [])


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_beside_a_cpu_pytorch_the_library_is_not_loaded(monkeypatch, tmp_path, fresh):
    library = tmp_path / "libriformer_cuda.so"
    library.write_bytes(b"never looked at")
    monkeypatch.setattr(cuda, "LIBRARY", library)
    assert cuda.unusable() == f"this PyTorch ({torch.__version__}) is built without CUDA"
    assert info.collect()["backends"][2]["built"]


def test_a_file_that_is_no_library_is_a_reason(monkeypatch, tmp_path, fresh):
    library = tmp_path / "libriformer_cuda.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(cuda, "LIBRARY", library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "libriformer_cuda.so does not load" in cuda.unusable()


class Library:
    """The loaded library's own answers."""

    def __init__(self, *served: int, driver: str = "") -> None:
        self.served, self.driver = served, driver

    def riformer_cuda_driver_error(self) -> bytes:
        return self.driver.encode()

    def riformer_cuda_architectures(self) -> bytes:
        return b"80, 90a"

    def riformer_cuda_serves(self, architecture: int) -> int:
        return architecture in self.served


@pytest.fixture
def pretend(monkeypatch, tmp_path, fresh):
    """GPUs of these compute capabilities, and a library that is there."""

    def machine(*capabilities: tuple[int, int], triton_reason: str | None = "no Triton", **answers) -> None:
        library = tmp_path / "libriformer_cuda.so"
        library.write_bytes(b"")
        loaded = Library(*answers.pop("served", (80, 86, 90)), **answers)
        monkeypatch.setattr(cuda, "LIBRARY", library)
        monkeypatch.setattr(cuda, "_library", lambda: loaded)
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"GPU {index}")
        monkeypatch.setattr(_devices, "capability", lambda index: capabilities[index])
        other = dataclasses.replace(triton.BACKEND, unusable=lambda: triton_reason, refuses=None)
        monkeypatch.setitem(backends.ALL, "triton", other)

    return machine


def test_no_device(pretend):
    pretend()
    assert cuda.unusable() == "no CUDA device is visible"


def test_an_old_driver(pretend):
    pretend((9, 0), driver="it was built with CUDA 13.0, the driver of this machine is for CUDA 12.4")
    assert "built with CUDA 13.0" in cuda.unusable()


def test_an_old_architecture_is_refused_by_name(pretend):
    pretend((7, 5))
    with pytest.raises(BackendError, match=r"cuda:0 \(GPU 0\) has compute capability 7.5; the kernels need 8.0"):
        backends.choose("cuda", GPU, torch.float16)


def test_an_architecture_that_is_not_compiled_in_names_the_build_option(pretend):
    pretend((9, 0), (8, 0), served=(90,))
    assert cuda.unusable() is None
    assert backends.choose("cuda", GPU, torch.float16) is cuda.BACKEND
    with pytest.raises(BackendError, match=r"compiled for 80, 90a and cuda:1 has .* 8.0; .*_CUDA_ARCHITECTURES=80"):
        backends.choose("cuda", torch.device("cuda", 1), torch.float16)


def test_auto_asks_triton_first(pretend):
    pretend((9, 0), triton_reason=None)
    assert backends.choose("auto", GPU, torch.bfloat16).name == "triton"
    assert backends.choose("cuda", GPU, torch.bfloat16) is cuda.BACKEND
    pretend((9, 0), triton_reason="triton is not installed")
    assert backends.choose("auto", GPU, torch.bfloat16) is cuda.BACKEND
    with pytest.raises(BackendError, match="it serves float32, bfloat16, float16"):
        backends.choose("cuda", GPU, torch.float64)


def test_info_names_what_it_is_compiled_for(pretend, capsys):
    pretend((9, 0), triton_reason=None)
    row = next(row for row in info.collect()["backends"] if row["name"] == "cuda")
    assert row["built"] and row["usable"] and row["detail"] == "sm_90" and row["architectures"] == ["80", "90a"]
    info._print(info.collect())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda "))
    assert "sm_90; compiled for 80, 90a" in line


def test_without_any_gpu_backend_the_error_gives_every_reason():
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(BackendError, match=r"triton: .*; cuda: .*`riformer-kernels info`"):
        backends.choose("auto", GPU, torch.float32)
    with pytest.raises(riformer_kernels.BackendError, match=r"unknown backend 'cudnn': .*'cuda'"):
        backends.choose("cudnn", GPU, torch.float32)
