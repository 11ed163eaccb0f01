"""Every op of the engine at S12's shapes against its eager form; `op_cases.py` says what each case is."""

from __future__ import annotations

from collections.abc import Callable

from op_cases import OpCase


def test_op(case: OpCase, bench_op: Callable[[OpCase], None]) -> None:
    bench_op(case)
