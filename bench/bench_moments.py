"""``moments``: the statistics pass, against ``torch.var_mean`` in float32, at S12's shapes."""

from __future__ import annotations

from collections.abc import Callable

from op_cases import OpCase


def test_moments(case: OpCase, bench_op: Callable[[OpCase], None]) -> None:
    bench_op(case)
