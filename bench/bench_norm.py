"""``norm``: a feature map normed from moments that exist already, against GroupNorm, at S12's shapes."""

from __future__ import annotations

from collections.abc import Callable

from op_cases import OpCase


def test_norm(case: OpCase, bench_op: Callable[[OpCase], None]) -> None:
    bench_op(case)
