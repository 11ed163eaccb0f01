"""What nvcc makes of the CUDA kernels. Where nvcc is installed the library is built for sm_80 and sm_90a, and then
read, not run.

The tests build it themselves, in `build/cuda`, because an installation beside a CPU build of PyTorch has none.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support_native import build

from riformer_kernels import ops

pytestmark = pytest.mark.slow
ARCHITECTURES = ("sm_80", "sm_90a")
# Spills and arrays that did not fit into registers are errors of this build.
STRICT = "-DCMAKE_CUDA_FLAGS=-Xptxas=--warning-as-error,--warn-on-spills,--warn-on-local-memory-usage"


def serialised(output: str) -> set[str]:
    """The kernels whose wgmma instructions ptxas runs one after the other, because it finds too few registers or cannot
    follow them."""
    return set(re.findall(r"wgmma\.mma_async instructions are serialized .* function '(\w+)'", output))


@pytest.fixture(scope="session")
def library() -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return build("cuda", "riformer_cuda", "-DRIFORMER_CUDA=ON", STRICT, objection=serialised)


def stand_in(library: Path) -> Path:
    """What the library was linked with in the place of a CUDA build's libtorch_cuda.so."""
    return library.parent / "csrc" / "cuda" / "libtorch_cuda.so"


def cuobjdump(library: Path, *options: str) -> str:
    """NVIDIA's disassembler, which comes with Triton."""
    found = importlib.util.find_spec("triton")
    tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if found else None
    if tool is None or not tool.exists():
        pytest.skip("cuobjdump is not installed (it comes with the wheel of triton)")
    environment = {"PATH": f"{tool.parent}:/usr/bin:/bin"}  # it calls nvdisasm
    return subprocess.run([tool, *options, library], check=True, capture_output=True, text=True, env=environment).stdout


@dataclass
class Kernel:
    """One kernel's machine code for one architecture."""

    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.instructions)


@pytest.fixture(scope="session")
def kernels(library) -> dict[tuple[str, str], Kernel]:
    """By architecture and name."""
    found: dict[tuple[str, str], Kernel] = defaultdict(Kernel)
    architecture = name = ""
    for line in cuobjdump(library, "-res-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            kernel = found[architecture, name]
            kernel.registers, kernel.stack, kernel.shared, kernel.local = map(int, match.groups())
    for line in cuobjdump(library, "-sass").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            name = match[1]
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", line):
            found[architecture, name].instructions[match[1]] += 1
    assert found
    return dict(found)


def test_every_kernel_is_compiled_and_read(kernels):
    assert {architecture for architecture, _ in kernels} == set(ARCHITECTURES)
    for key, kernel in kernels.items():
        assert kernel.registers > 0 and sum(kernel.instructions.values()) > 8, key


def test_no_kernel_keeps_anything_in_local_memory(kernels):
    """No spills, and no arrays that are indexed at run time: each would be a trip to memory in an inner loop."""
    for key, kernel in kernels.items():
        assert (kernel.stack, kernel.local) == (0, 0), (key, kernel)
        assert not kernel.has("LDL") and not kernel.has("STL"), key
        assert kernel.registers <= 255, key


def test_shared_memory_is_given_at_the_launch(kernels):
    """The launch checks its size, and shared memory that a kernel declares would come on top of that. On Hopper a
    kilobyte of each thread block belongs to the system."""
    for (architecture, name), kernel in kernels.items():
        assert kernel.shared in ((0,) if architecture == "sm_80" else (0, 1024)), (architecture, name)


def test_products_use_matrix_instructions(kernels):
    for architecture, prefix in (("sm_80", "HMMA.16816.F32"), ("sm_90a", "HGMMA.64x")):
        used = {name for (found, _), kernel in kernels.items() if found == architecture for name in kernel.instructions}
        matrix = {name for name in used if name.startswith(prefix)}
        assert any(name.endswith(".BF16") for name in matrix), (architecture, matrix)
        assert any(not name.endswith(".BF16") for name in matrix), (architecture, matrix)


def test_the_kernels_of_hopper_are_for_sm_90a_alone(kernels):
    with_wgmma = {name for (_, name), kernel in kernels.items() if kernel.has("HGMMA")}
    assert with_wgmma and not any(("sm_80", name) in kernels for name in with_wgmma)


def test_later_gpus_find_ptx(library):
    listed = cuobjdump(library, "-lptx")
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listed)) == {"sm_80"}, listed


# ------------------------------------------------------------------------------------------------------------- library


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_what_the_library_needs_and_offers(library):
    """No CPython symbol, no C++ symbol of torch, and no CUDA library. The runtime inside opens the driver by itself."""

    def symbols(*options: str) -> list[str]:
        lines = subprocess.run(["nm", "-D", *options, library], capture_output=True, text=True, check=True).stdout
        return [line.split()[-1].split("@")[0] for line in lines.splitlines()]

    needed = symbols("--undefined-only")
    assert "aoti_torch_get_current_cuda_stream" in needed
    forbidden = [s for s in needed if re.match(r"_?Py|_ZNK?(3c10|2at|5torch|5caffe)|cu[A-Z]|cuda[A-Z]", s)]
    assert not forbidden, f"these break with another torch or Python, or need a CUDA toolkit: {forbidden}"
    offered = [s for s in symbols("--defined-only") if not re.match(r"_Z|_init$|_fini$|__bss_start|_edata|_end", s)]
    names = {"architectures", "choice", "driver_error", "serves"}
    assert set(offered) == {f"riformer_cuda_{name}" for name in names}, offered


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_the_library_names_its_libraries_and_no_path(library):
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed
    system = {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libdl.so.2",
        "librt.so.1",
        "libpthread.so.0",
    }
    assert needed - system <= {"libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "ld-linux-x86-64.so.2"}, needed


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA and a libtorch_cuda.so of its own")
def test_it_loads_beside_libtorch_cuda_and_registers_its_kernels(library):
    """With the stand-in in the place of libtorch_cuda.so: nothing can be called, but everything is found."""
    code = f"""
import ctypes, torch, riformer_kernels
from riformer_kernels import ops
from riformer_kernels.backends import cuda
ctypes.CDLL({str(stand_in(library))!r})
torch.ops.load_library({str(library)!r})
for name in ops.ALL:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"riformer_cuda::{{name}}", "CUDA"), name
cuda.LIBRARY = {str(library)!r}
found = cuda._library()
assert found.riformer_cuda_architectures() == b"80, 90a"
served = [a for a in (70, 75, 80, 86, 89, 90, 100, 120) if found.riformer_cuda_serves(a)]
assert served == [80, 86, 89, 90, 100, 120], served
hopper, ampere = (found.riformer_cuda_choice(8, 64, 256, 3136, 1, a, 132).decode() for a in (90, 80))
assert hopper and ampere and hopper != ampere, (hopper, ampere)
for architecture in (80, 90):
    unknown = found.riformer_cuda_choice(8, 64, 256, 3136, 7, architecture, 132).decode()
    assert "dtype 7 has no element type" in unknown, unknown
print("driver:", found.riformer_cuda_driver_error().decode())
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("driver: ")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has a libtorch_cuda.so")
def test_without_libtorch_cuda_that_is_the_reason(library):
    code = f"""
import pathlib, torch, riformer_kernels
from riformer_kernels.backends import cuda
cuda._load.cache_clear()
cuda.LIBRARY, torch.version.cuda = pathlib.Path({str(library)!r}), "13.0"
print(cuda.unusable())
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "libriformer_cuda.so does not load: libtorch_cuda.so: cannot open shared object file" in done.stdout


def test_every_op_is_in_the_library(library):
    content = library.read_bytes()
    for name in ops.ALL:
        assert f"\0{name}\0".encode() in content, name
