"""Fixtures of the tests of bench/."""

from __future__ import annotations

import sys

import pytest
import torch
from support_bench import BENCH
from support_paths import TESTS

from riformer_kernels.backends import cpu


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
