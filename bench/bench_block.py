"""``block``: a whole deployed block, moments in and out, against `RIFormerBlock`, at S12's shapes."""

from __future__ import annotations

from collections.abc import Callable

from op_cases import OpCase


def test_block(case: OpCase, bench_op: Callable[[OpCase], None]) -> None:
    bench_op(case)
