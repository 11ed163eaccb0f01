"""Builds `tests/install/kernel_check` with CMake: the CPU kernels without PyTorch, for this machine or for Arm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support_paths import ROOT

CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ARM = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}")

# CMakeLists.txt has the flags of an ordinary build; those of "Debug" are free.
BARELY_OPTIMISED = ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-Og")


@dataclass(frozen=True)
class Check:
    """A built program, and what it is run by."""

    program: Path
    by: tuple[str, ...] = ()

    def __call__(self, *arguments: str, cpu: str = "max", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it. ``cpu``: the processor that is emulated."""
        command = [*self.by, *(("-cpu", cpu) if self.by else ()), str(self.program), *arguments]
        kept = {name: value for name, value in os.environ.items() if name != "RIFORMER_CPU_ISA"}
        return subprocess.run(command, capture_output=True, text=True, env={**kept, **environment})


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user")


def tool(name: str) -> str:
    """A build tool, from the environment that tests run in before the machine's own."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} not found; pip install {name}")
    return found


def start_build(folder: Path, *options: str, source: Path = ROOT) -> subprocess.Popen[bytes]:
    """Configure ``folder`` and start to build the program there. Its output goes to ``folder / "log"``."""
    folder.mkdir()
    log = (folder / "log").open("wb")
    configure = [
        tool("cmake"), "-S", str(source), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DRIFORMER_KERNEL_CHECK=ON", *options,
    ]  # fmt: skip
    done = subprocess.run(configure, stdout=log, stderr=subprocess.STDOUT)
    assert done.returncode == 0, (folder / "log").read_text()
    return subprocess.Popen(
        [tool("cmake"), "--build", str(folder), "--target", "kernel_check"], stdout=log, stderr=subprocess.STDOUT
    )


def built(folder: Path, process: subprocess.Popen[bytes], *by: str) -> Check:
    """Wait for a build that was started."""
    status = process.wait()
    log = (folder / "log").read_text()
    assert status == 0 and "warning" not in log, log
    return Check(folder / "kernel_check", by)
