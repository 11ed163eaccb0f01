"""Every op on every target: the numbers, by the error-ratio rule. The cases are in `tests/support_conformance.py`."""

from __future__ import annotations

import pytest
from support_conformance import CASES, CHECKS, cases_of, check_op
from support_target import chosen

from riformer_kernels import ops


def parametrized(op: str) -> list:
    return [
        pytest.param(
            (target, setting), op, case, id="-".join(filter(None, (str(target), setting.name, op, str(case)))),
            marks=target.marks,
        )
        for target in chosen()
        for setting, case in cases_of(target, op)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "op", "case"), [row for op in CASES for row in parametrized(op)], indirect=["target"]
)
def test_op(target, op, case):
    check_op(target, op, case)


@pytest.mark.parametrize("op", ops.ALL)
def test_every_op_has_cases_on_every_target(op):
    """A new op fails here until `support_conformance.CASES` and `CHECKS` say how it is tested."""
    assert op in CASES and op in CHECKS, f"op {op!r} has no conformance cases"
    for target in chosen():
        assert op in target.ops and any(True for _ in cases_of(target, op)), f"target {target} runs no case of {op!r}"


def test_there_are_no_cases_of_other_ops():
    assert CASES.keys() == CHECKS.keys() == ops.ALL.keys()
