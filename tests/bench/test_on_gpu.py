"""`bench/on_gpu.sh` and what it calls, as far as that can be tried without a GPU: the order of the tests, what is
printed when the time is up, and that a step that fails does not take the others with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support_bench import BENCH, module
from support_paths import ROOT

TESTS = """
import time
import pytest

@pytest.mark.gpu
def test_that_passes():
    pass

@pytest.mark.gpu
def test_that_fails():
    assert "the defect" == "seen"

@pytest.mark.gpu
@pytest.mark.slow
def test_that_hangs():
    time.sleep(300)
"""


def run(folder: Path, steps: str, **environment: str) -> subprocess.CompletedProcess:
    """The script in a process of its own, with this Python and nothing compiled."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    # Stand-ins for the compilers: cmake fails, and Triton's variants are not compiled.
    (tools / "cmake").write_text("#!/bin/sh\necho no compiler here\nexit 1\n")
    (tools / "python").write_text(
        '#!/bin/sh\ncase "$1" in bench/triton_cache.py) echo "variants for $2"; exit 0;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return subprocess.run(
        [BENCH / "on_gpu.sh", folder / "results"], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"),
             "ARCHITECTURE": "90", "STEPS": steps, **environment},
    )  # fmt: skip


@pytest.fixture
def three(tmp_path: Path) -> str:
    path = tmp_path / "test_three.py"
    path.write_text(TESTS)
    return str(path)


def test_when_the_time_is_up_what_failed_is_printed(tmp_path: Path, three: str) -> None:
    done = run(tmp_path, "check", TESTS=three, CHECKED="15")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "KeyboardInterrupt" in done.stdout and "1 failed, 1 passed" in done.stdout
    assert done.stdout.index("FAILED") < done.stdout.index("KeyboardInterrupt"), "at once, and not in the end alone"
    assert """assert 'the defect' == 'seen'""" in done.stdout.partition("KeyboardInterrupt")[0]
    rows = [json.loads(line) for line in (tmp_path / "results" / "gpu-tests.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows if "hangs" not in row["test"]] == ["passed", "failed"]
    assert "== check: exit" in done.stdout and (tmp_path / "results" / "gpu-check.log").stat().st_size


def test_without_the_library_the_other_steps_run(tmp_path: Path, three: str) -> None:
    done = run(tmp_path, "build check time", TESTS=f"{three}::test_that_passes", TIMED="5")
    assert done.returncode == 1
    assert "no compiler here" in done.stdout and "the CUDA library was not built" in done.stdout
    assert "variants for 90" in done.stdout, "Triton's part does not depend on nvcc's"
    assert "== build: exit 1" in done.stdout and "== check: exit 0" in done.stdout and "1 passed" in done.stdout
    if not torch.cuda.is_available():
        assert "nothing measured: no GPU to run on" in done.stdout and "== time: exit 2" in done.stdout


def test_a_library_from_elsewhere_is_not_built(tmp_path: Path) -> None:
    done = run(tmp_path, "build", LIBRARY=str(tmp_path / "absent.so"))
    assert done.returncode == 1 and "no compiler here" not in done.stdout and "absent.so" in done.stdout


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "check-all")
    assert done.returncode == 2 and "unknown step 'check-all', expected build, check or time" in done.stderr


# ---------------------------------------------------------------------------------------------------------- the order


def test_the_tests_come_in_order(bench_on_path: None) -> None:
    options = ["-p", "gpu_order", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/gpu/test_gpu.py", "tests/conformance"],
        capture_output=True, text=True, timeout=240, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{BENCH}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    names = [line for line in found.stdout.splitlines() if "::" in line]
    slow = [name for name in names if "::test_model[" in name]
    assert len(names) > 400 and len(slow) == 300, "the two backends, five networks, five sizes, layouts and dtypes"
    assert "test_same_bits_again" in names[0] and "test_conformance" not in "".join(names[:20])
    first_slow = names.index(slow[0])
    assert all("test_model[" in name or "beyond" in name or "memory" in name for name in names[first_slow:])
    assert all("bfloat16" in name and "s12" in name for name in slow[:20])
    assert "test_out_of_memory" in names[-1] or "test_offsets" in names[-1]


def test_the_names_of_the_order_are_those_of_tests(bench_on_path: None) -> None:
    order = module("gpu_order")
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if "bench" not in path.parts)
    missing = [name for name in (*order.FIRST, *order.LAST) if f"def {name.rstrip('[')}" not in text]
    files = {path.stem for path in (ROOT / "tests" / "conformance").glob("test_*.py")}
    assert set(missing) <= files, "a name that no test has orders nothing"


# ----------------------------------------------------------------------------------------------------- Triton's cache

SHARES = """
import sys
import triton_cache
from riformer_kernels.backends.triton import ahead
every = triton_cache.launches
found = [launch for launch in every(90) if launch.kernel.__name__ in ("_merge_kernel", "_tile_kernel")]
triton_cache.launches = lambda architecture: found
print(len(found), *(triton_cache.compile_share(90, share, 3) for share in range(3)))
"""


def test_shares_make_up_the_whole_and_lie_where_a_launch_looks(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {
        **os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{BENCH}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)

    def compiled() -> tuple[list[int], set[str]]:
        done = subprocess.run(
            [sys.executable, "-c", SHARES], capture_output=True, text=True, timeout=240, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return [int(word) for word in done.stdout.split()], {
            path.name + str(path.parent) for path in tmp_path.rglob("*.cubin")
        }

    (recorded, *shares), files = compiled()
    assert 1 < sum(shares) == len(files) < recorded and min(shares) >= sum(shares) // 3
    assert compiled() == ([recorded, *shares], files), "the second time everything is found"
