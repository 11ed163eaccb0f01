"""Builds the native CPU library with CMake and ninja; everything else about the package is in pyproject.toml.

    pip install torch                                   # or the CPU build of it; 2.10 or later
    pip install setuptools wheel cmake ninja
    pip install --no-build-isolation .

The library is compiled against the installed torch's headers but uses only its stable ABI and nothing of CPython, so
one build serves every torch from 2.10 on and every Python. ``RIFORMER_CPU=off`` installs without it; ``CMAKE_ARGS`` is
handed to CMake.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libriformer_cpu.so"
NOTE = "cpu_not_built.txt"  # read by riformer_kernels/backends/cpu.py
TORCH_FLOOR = (2, 10)
WAY_OUT = "To install without the native kernels, set RIFORMER_CPU=off (backend='reference' still works)."


def fail(reason: str) -> None:
    raise SystemExit(f"\nriformer-kernels: the native CPU library cannot be built: {reason}\n{WAY_OUT}\n")


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
    raise AssertionError


class BuildLibrary(build_ext):
    """Runs CMake; the "extension" is a plain shared library, named alike for every Python."""

    built: Path | None = None  # the library, or the note that says why there is none

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.with_name(NOTE)
        switch = os.environ.get("RIFORMER_CPU", "on").strip().lower()
        if switch in ("off", "0", "false", "no"):
            target.unlink(missing_ok=True)
            self.built = note
            note.write_text("not built: the package was installed with RIFORMER_CPU=off\n")
            return
        if switch not in ("on", "1", "true", "yes", ""):
            fail(f"RIFORMER_CPU={switch!r} is not understood, expected on or off.")
        build = Path(self.build_temp).resolve() / "cpu"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DCMAKE_CXX_COMPILER={shlex.split(compiler())[0]}",
            # Said each time, because CMake remembers an earlier build's answer.
            f"-DTORCH_ROOT={torch_root()}", "-DRIFORMER_SANITIZE=", *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        for command in (configure, [tool("cmake"), "--build", str(build)]):
            if subprocess.run(command).returncode != 0:
                fail(f"this step failed, its output is above: {shlex.join(command)}")
        note.unlink(missing_ok=True)
        # Renamed into place: a process that has the old library loaded keeps it whole.
        fresh = target.with_name(f"{LIBRARY}.new")
        shutil.copyfile(build / LIBRARY, fresh)
        os.replace(fresh, target)
        self.built = target

    def get_outputs(self) -> list[str]:
        return [str(self.built)] if self.built else super().get_outputs()

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install: the built file, and its place in the source tree."""
        return {str(self.built): str(self.source_folder() / self.built.name)} if self.inplace and self.built else {}

    def source_folder(self) -> Path:
        build_py = self.get_finalized_command("build_py")
        return Path(build_py.get_package_dir("riformer_kernels")).resolve() / "lib"

    def copy_extensions_to_source(self) -> None:
        folder = self.source_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for stale in {LIBRARY, NOTE} - {self.built.name}:
            (folder / stale).unlink(missing_ok=True)
        fresh = folder / f"{self.built.name}.new"
        shutil.copyfile(self.built, fresh)
        os.replace(fresh, folder / self.built.name)


class PlatformWheel(bdist_wheel):
    """Any Python 3, this platform: the library holds no CPython symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("riformer_kernels.lib.riformer_cpu", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
