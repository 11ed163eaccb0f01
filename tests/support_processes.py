"""Runs of pytest in processes of their own: each needs another environment, or minutes.

All runs of a test module start at once, as most machines have more than one core.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support_paths import ROOT


@contextmanager
def started(
    runs: Mapping[str, Sequence[str | Path]], logs: Path, **environment: str
) -> Iterator[dict[str, tuple[Path, subprocess.Popen]]]:
    """A process for each of ``runs``, a name and pytest's arguments; by name, its log and the process."""
    processes = {}
    for name, arguments in runs.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
        output = logs / f"{name}.log"
        with output.open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
            )  # fmt: skip
        processes[name] = output, process
    yield processes
    for _, process in processes.values():
        process.kill()
        process.wait()


def check(output: Path, process: subprocess.Popen) -> None:
    """Wait for one of them: it passes, or skips for want of the native library where that was asked for."""
    status = process.wait()
    text = output.read_text()
    tail = "\n".join(text.splitlines()[-80:])
    if status and os.environ.get("RIFORMER_CPU") == "off" and "RIFORMER_CPU=off" in text:
        pytest.skip("RIFORMER_CPU=off: the checks are those of the native kernels' tests")
    assert status == 0, tail
    assert re.search(r"\d+ passed", tail) and "failed" not in tail, tail
