"""Fixtures of the tests of bench/."""

from __future__ import annotations

import sys

import pytest
from support_bench import BENCH
from support_cpu import need_native
from support_paths import TESTS

from riformer_kernels.machine import threads


@pytest.fixture(scope="module", autouse=True)
def bench_on_path(tmp_path_factory: pytest.TempPathFactory):
    """The modules of bench/ import each other by their bare names, as scripts do; processes find this folder, too."""
    cache = pytest.MonkeyPatch()
    cache.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # where the probe is compiled to
    folders = [str(BENCH), str(TESTS)]
    sys.path[:0] = folders
    with threads(1):
        yield
    for folder in folders:
        sys.path.remove(folder)
    for name, found in list(sys.modules.items()):
        if (getattr(found, "__file__", None) or "").startswith(str(BENCH)):
            del sys.modules[name]
    cache.undo()


@pytest.fixture
def native() -> None:
    """The test needs the native library. Where it is missing that is a failure, unless it was left out on purpose."""
    need_native()
