"""For the tests of bench/: its modules, and targets for its processes to run."""

from __future__ import annotations

import importlib
import os
import sys
import time
from types import ModuleType

import torch
from support_paths import ROOT

from riformer_kernels.backends import cpu

BENCH = ROOT / "bench"
TINY = {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64]}


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


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
