"""How the tests of faults judge: a check has to object to each fault, and for the numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from support_block import SEMANTICS

# A mean of 1000, a small variance, one position and ordinary values: one case of SEMANTICS for each thing that a case
# can show. The rest of SEMANTICS repeats these.
FEW_SEMANTICS = [case for case in SEMANTICS if case.form != "deployed" or case.values == "small" or case.size == (1, 1)]


def objection(check: Callable[[Any], Any], case: Any) -> str | None:
    """What ``check`` says against ``case``, or None. It has to be about the numbers and nothing else."""
    try:
        check(case)
    except AssertionError as error:
        why = str(error)
    else:
        return None
    assert any(part in why for part in ("x (limit", "a mean is off by", "a centred sum of squares is off by")), why
    return why


def caught_by(check: Callable[[Any], Any], cases: Iterable[Any]) -> dict[str, str]:
    """The cases that ``check`` objects to, and what it says."""
    found = {str(case): objection(check, case) for case in cases}
    return {case: why for case, why in found.items() if why is not None}


def first_caught(check: Callable[[Any], Any], cases: Iterable[Any]) -> dict[str, str]:
    """As `caught_by`, but done with the first case that objects: a fault needs no second one."""
    for case in cases:
        if found := caught_by(check, [case]):
            return found
    return {}


def judge(fault: str, found: dict[str, str]) -> None:
    """A fault was caught; without one (""), nothing was."""
    assert bool(found) == bool(fault), found or f"SURVIVED: {fault!r}"
