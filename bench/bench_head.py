"""``head``: logits from moments that exist already, against GroupNorm, mean and linear, at S12's shapes."""

from __future__ import annotations

from collections.abc import Callable

from op_cases import OpCase


def test_head(case: OpCase, bench_op: Callable[[OpCase], None]) -> None:
    bench_op(case)
