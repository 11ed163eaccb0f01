"""Builds the native libraries with CMake and ninja; everything else about the package is in pyproject.toml.

    pip install torch                                   # or the CPU build of it; 2.10 or later
    pip install setuptools wheel cmake ninja
    pip install --no-build-isolation .

The libraries are compiled against the installed torch's headers but use only its stable ABI and nothing of CPython, so
one build serves every torch from 2.10 on and every Python. What the environment may say while building:

    RIFORMER_CPU=on|off             off: install without the CPU kernels
    RIFORMER_CUDA=auto|on|off       the CUDA kernels; auto: where nvcc and a CUDA build of torch are installed
    RIFORMER_CUDA_ARCHITECTURES     compute capabilities to compile them for (default: 80;90a)
    CMAKE_ARGS                      handed to CMake
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_FLOOR = (2, 10)
CUDA_FLOOR = (12, 5)  # the first with cudaGetDriverEntryPointByVersion, by which tensor maps are made
ARCHITECTURES = "80;90a"
WAY_OUT = {
    "CPU": "To install without the CPU kernels, set RIFORMER_CPU=off (backend='reference' still works).",
    "CUDA": "To install without the CUDA kernels, set RIFORMER_CUDA=off (backend='triton' serves the same GPUs).",
}
ON, OFF = ("on", "1", "true", "yes"), ("off", "0", "false", "no")


def fail(reason: str, kind: str = "CPU") -> NoReturn:
    raise SystemExit(f"\nriformer-kernels: the native {kind} library cannot be built: {reason}\n{WAY_OUT[kind]}\n")


def torch_root() -> Path:
    """Folder of the installed torch, checked against the floor of the stable ABI that is used."""
    try:
        import torch
    except ImportError:
        fail(
            "torch is not installed in the environment that builds. Install torch first (2.10 or later) and pass "
            "--no-build-isolation, so that no second copy of it is downloaded."
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_FLOOR:
        fail(f"torch {torch.__version__} is installed, expected 2.10 or later.")
    return Path(torch.__file__).resolve().parent


def tool(name: str) -> str:
    """A build tool, from the environment that builds before the machine's own."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        fail(f"{name} was not found. Install it: pip install {name}")
    return found


def compiler() -> str:
    name = os.environ.get("CXX")
    candidates = [name] if name else ["c++", "g++", "clang++"]
    for candidate in candidates:
        found = shutil.which(shlex.split(candidate)[0])
        if found:
            return candidate
    fail(f"no C++17 compiler was found (looked for {', '.join(candidates)}; set CXX to name another).")


def switch(kind: str, default: str, *others: str) -> str:
    """What RIFORMER_CPU or RIFORMER_CUDA says: "on", "off", or one of ``others``."""
    value = os.environ.get(f"RIFORMER_{kind}", "").strip().lower() or default
    if value in others:
        return value
    if value not in ON + OFF:
        fail(f"RIFORMER_{kind}={value!r} is not understood, expected {', '.join(('on', 'off', *others))}.", kind)
    return "on" if value in ON else "off"


def nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, CUDA_HOME, the path, or the usual folder."""
    named = os.environ.get("CUDACXX")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [named] if named else ["nvcc", *(str(Path(home) / "bin" / "nvcc") for home in homes if home)]
    return next((found for found in map(shutil.which, candidates) if found), None)


def why_no_cuda(wish: str) -> str | None:
    """Why the CUDA library is not built, or None."""
    if wish == "off":
        return "the package was installed with RIFORMER_CUDA=off"
    import torch

    if wish == "auto" and torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__}, which was installed at the time, has no CUDA (RIFORMER_CUDA=on builds it "
            "all the same)"
        )
    found = nvcc()
    if found is None:
        reason = "nvcc was not found (looked at CUDACXX, CUDA_HOME, the path and /usr/local/cuda)"
    else:
        text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release (\d+)\.(\d+)", text)
        if version and tuple(map(int, version.groups())) >= CUDA_FLOOR:
            return None
        old = ".".join(version.groups()) if version else "?"
        reason = f"{found} is of CUDA {old}, expected {'.'.join(map(str, CUDA_FLOOR))} or later"
    if wish == "on":
        fail(f"RIFORMER_CUDA=on, and {reason}.", "CUDA")
    return f"{reason}; install the CUDA toolkit and then this package again"


class BuildLibrary(build_ext):
    """Runs CMake; the "extensions" are plain shared libraries, named alike for every Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.built: dict[str, Path] = {}  # by extension: the library, or the note that says why there is none

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return str(Path(*folders) / f"lib{name}.so")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = "CUDA" if ext.name.endswith("cuda") else "CPU"
        note = target.with_name(note_of(target.name))  # read by riformer_kernels/backends/
        if kind == "CUDA":
            reason = why_no_cuda(switch(kind, "auto", "auto"))
        else:
            reason = "the package was installed with RIFORMER_CPU=off" if switch(kind, "on") == "off" else None
        if reason:
            target.unlink(missing_ok=True)
            note.write_text(f"not built: {reason}\n")
            self.built[ext.name] = note
            return
        build = Path(self.build_temp).resolve() / kind.lower()
        build.mkdir(parents=True, exist_ok=True)
        for command in self.commands(kind, build, target.stem.removeprefix("lib")):
            if subprocess.run(command).returncode != 0:
                fail(f"this step failed, its output is above: {shlex.join(command)}", kind)
        note.unlink(missing_ok=True)
        replace(build / target.name, target)
        self.built[ext.name] = target

    def commands(self, kind: str, build: Path, target: str) -> Iterator[list[str]]:
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DCMAKE_CXX_COMPILER={shlex.split(compiler())[0]}",
            # Said each time, because CMake remembers an earlier build's answer.
            f"-DTORCH_ROOT={torch_root()}", "-DRIFORMER_SANITIZE=",
        ]  # fmt: skip
        if kind == "CUDA":
            chosen = os.environ.get("RIFORMER_CUDA_ARCHITECTURES", "").replace(",", ";").strip() or ARCHITECTURES
            configure += [
                "-DRIFORMER_CUDA=ON",
                f"-DCMAKE_CUDA_COMPILER={nvcc()}",
                f"-DRIFORMER_CUDA_ARCHITECTURES={chosen}",
            ]
        yield [*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        yield [tool("cmake"), "--build", str(build), "--target", target]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.built.values()] or super().get_outputs()

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install: the built files, and their places in the source tree."""
        return (
            {str(path): str(self.source_folder() / path.name) for path in self.built.values()} if self.inplace else {}
        )

    def source_folder(self) -> Path:
        build_py = self.get_finalized_command("build_py")
        return Path(build_py.get_package_dir("riformer_kernels")).resolve() / "lib"

    def copy_extensions_to_source(self) -> None:
        folder = self.source_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for ext in self.extensions:
            library, built = Path(self.get_ext_filename(ext.name)).name, self.built[ext.name]
            for stale in {library, note_of(library)} - {built.name}:
                (folder / stale).unlink(missing_ok=True)
            replace(built, folder / built.name)


def note_of(library: str) -> str:
    """libriformer_cuda.so: cuda_not_built.txt."""
    return f"{library.removeprefix('libriformer_').removesuffix('.so')}_not_built.txt"


def replace(built: Path, target: Path) -> None:
    """Copied, then renamed into place: a process that has the old library loaded keeps it whole."""
    fresh = target.with_name(f"{target.name}.new")
    shutil.copyfile(built, fresh)
    os.replace(fresh, target)


class PlatformWheel(bdist_wheel):
    """Any Python 3, this platform: the libraries hold no CPython symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension(f"riformer_kernels.lib.riformer_{kind}", sources=[]) for kind in ("cpu", "cuda")],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
