"""``embed``: the stem and the three downsamplings, moments included, against the convolution alone, at S12's shapes."""

from __future__ import annotations

from collections.abc import Callable

from op_cases import OpCase


def test_embed(case: OpCase, bench_op: Callable[[OpCase], None]) -> None:
    bench_op(case)
