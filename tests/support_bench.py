"""For the tests of bench/: its modules, and targets for its processes to run."""

from __future__ import annotations

import importlib
import os
import sys
import time
from types import ModuleType

import pytest
import torch
from support_paths import ROOT, TESTS

from riformer_kernels.backends import cpu

BENCH = ROOT / "bench"
TINY = {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64]}


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module", autouse=True)
def bench_on_path(tmp_path_factory: pytest.TempPathFactory):
    """The modules of bench/ import each other by their bare names, as scripts do; processes find this folder, too."""
    cache = pytest.MonkeyPatch()
    cache.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # where the probe is compiled to
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folders = [str(BENCH), str(TESTS)]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)
    for name, found in list(sys.modules.items()):
        if (getattr(found, "__file__", None) or "").startswith(str(BENCH)):
            del sys.modules[name]
    torch.set_num_threads(threads)
    cache.undo()


@pytest.fixture
def native() -> None:
    reason = cpu.unusable()
    if reason:
        pytest.skip(reason)


# ---------------------------------------------------------------------------------------------------------- targets


def buffers(megabytes: int):
    """For the memory test: a call at batch n touches n buffers of so many MB and frees them."""
    return lambda batch: lambda: [torch.ones(megabytes << 18) for _ in range(batch)] and None


def naps(seconds: float, batches: int = 1):
    """For the worker tests: a call that prints and sleeps; the facts say where it runs."""

    def call() -> None:
        print("not an answer")
        time.sleep(seconds)

    facts = {"batches": batches, "threads": torch.get_num_threads(), "variable": os.environ.get("RIFORMER_TEST")}
    return call, {**facts, "isa": cpu.isa_status()["chosen"], "torch_isa": torch.backends.cpu.get_cpu_capability()}


def dies(where: str):
    """Leaves without an answer, at once or in the call."""
    if where == "at once":
        print("the last words", file=sys.stderr)
        os._exit(3)
    return lambda: os.kill(os.getpid(), 9), {}


def raises():
    raise ValueError("no such runtime")
