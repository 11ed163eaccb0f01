"""Options and fixtures of the pytest-benchmark suite: ``pytest bench``, or ``pytest bench -k block-1x64``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import measure
import op_cases
import pytest
import torch

from riformer_kernels.dtypes import NAMES
from riformer_kernels.machine import threads


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("riformer")
    group.addoption("--dtype", action="append", choices=NAMES, help="repeatable; default: float32 and bfloat16")
    group.addoption("--seconds", type=float, default=0.3, help="interleaved measuring per peer of an op (default: 0.3)")
    group.addoption("--model-seconds", type=float, default=3.0, help="the same per peer of the model (default: 3)")
    group.addoption("--threads", type=int, help="PyTorch's threads (default: its own choice)")
    group.addoption("--no-compile", action="store_true", help="without torch.compile, which takes minutes per case")


def dtypes(config: pytest.Config) -> tuple[torch.dtype, ...]:
    return tuple(getattr(torch, name) for name in config.getoption("--dtype") or NAMES[:2])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case``: every case of every op; ``model_dtype``: the dtypes that the options name."""
    if "case" in metafunc.fixturenames:
        found = [case for op in op_cases.SHAPES for case in op_cases.cases(op, dtypes(metafunc.config))]
        metafunc.parametrize("case", found, ids=[str(case).replace(" ", "-") for case in found])
    if "model_dtype" in metafunc.fixturenames:
        metafunc.parametrize("model_dtype", dtypes(metafunc.config), ids=measure.dtype_name)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with threads(request.config.getoption("--threads")):
        yield


@pytest.fixture
def bench_op(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[op_cases.OpCase], None]:
    """``bench_op(case)``: assert the numbers, measure against the eager form, then let pytest-benchmark time ours."""

    def run(case: op_cases.OpCase) -> None:
        rows = measure.op(case, seconds=request.config.getoption("--seconds"))
        ours, others = rows[0], rows[1:]
        best = min(others, key=lambda row: row["ms"])
        benchmark.group = f"{case.op} {measure.dtype_name(case.dtype)} batch {case.batch}"
        benchmark.extra_info.update(measure.extra_info(ours, {row["peer"]: row for row in others}, best["peer"]))
        built = op_cases.build(case)
        x, moments = built.inputs()
        calls = max(1, int(1 / max(ours["ms"], 1e-3)))
        with torch.inference_mode():
            benchmark.pedantic(built.ours, args=(x, moments), rounds=20, iterations=calls, warmup_rounds=2)

    return run
