"""The suite's own rules: every test can fail, support modules hold no tests, and no test imports another test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support_block import Block
from support_cases import RatiosExceeded, check_again, check_ratios
from support_paths import TESTS

FILES = sorted(TESTS.rglob("*.py"))
TEST_FILES = [path for path in FILES if re.match(r"(test|emulated|interpreted)_", path.name)]
OTHERS = [path for path in FILES if path not in TEST_FILES]
# Whoever calls one of these asserts: `pytest.raises`, `torch.testing.assert_close`, `mock.assert_called_once`, and the
# functions of the support modules that are named for it.
ASSERTING = re.compile(r"^(raises|warns|fail|assert_\w+|_?check(_\w+)?|judge|opcheck|compare_\w+|failing)$")


def called(node: ast.AST) -> str:
    """The last name of what a call calls: "raises" for ``pytest.raises(...)``."""
    function = node.func if isinstance(node, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def asserts(function: ast.AST, helpers: frozenset[str] = frozenset()) -> bool:
    """Whether ``function`` contains an assertion, or calls something that is named for one or is in ``helpers``."""
    return any(
        isinstance(node, ast.Assert) or ASSERTING.match(called(node)) or called(node) in helpers
        for node in ast.walk(function)
    )


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_test(function: ast.FunctionDef) -> bool:
    return function.name.startswith("test")


def without_assertion(source: str) -> list[str]:
    """The tests that cannot fail by an assertion, their own or that of a function of the same file that they call."""
    tree = ast.parse(source)
    helpers: frozenset[str] = frozenset()
    while True:
        more = frozenset(f.name for f in functions(tree) if not is_test(f) and asserts(f, helpers))
        if more == helpers:
            break
        helpers = more
    return [f.name for f in functions(tree) if is_test(f) and not asserts(f, helpers)]


def held_tests(source: str) -> list[str]:
    """The test functions and test classes of a module."""
    tree = ast.parse(source)
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    return classes + [function.name for function in functions(tree) if is_test(function)]


def imported_tests(source: str) -> list[str]:
    """The test modules and conftest modules that a module imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if re.match(r"(test_|emulated_|interpreted_|conftest)", name)]


def name_of(path: Path) -> str:
    return str(path.relative_to(TESTS))


@pytest.mark.parametrize("path", TEST_FILES, ids=name_of)
def test_every_test_has_an_assertion(path):
    assert not without_assertion(path.read_text())


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_a_support_module_holds_no_test(path):
    assert not held_tests(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_imports_a_test(path):
    """What tests share lives in support modules, and fixtures in conftest.py, where pytest finds them."""
    assert not imported_tests(path.read_text())


def test_the_files_are_found():
    assert len(TEST_FILES) > 40 and len(OTHERS) > 15


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def test_a():\n    f()\n", ["test_a"]),
        ("def test_a():\n    f() == 2\n", ["test_a"]),
        ("class T:\n    def test_a(self):\n        torch.allclose(x, y)\n", ["test_a"]),
        ("def test_a():\n    assert f()\n", []),
        ("def test_a():\n    with pytest.raises(ValueError):\n        f()\n", []),
        ("def f():\n    assert x\ndef g():\n    f()\ndef test_a():\n    g()\n", []),
        ("def f():\n    g()\ndef test_a():\n    f()\n", ["test_a"]),
        ("def test_a():\n    check_block(run, case)\n", []),
    ],
)
def test_a_test_without_an_assertion_is_noticed(source, found):
    assert without_assertion(source) == found


def test_a_support_module_with_a_test_is_noticed():
    assert held_tests("def test_a(): ...\nclass TestB: ...\n") == ["TestB", "test_a"]
    assert held_tests("def tested(): ...\n") == ["tested"], "pytest collects what begins with test"
    assert held_tests("def check(): ...\n") == []


def test_an_import_of_a_test_is_noticed():
    source = "import conftest\nfrom test_block import x\nimport test_norm as y\nimport support_cpu\n"
    assert imported_tests(source) == ["conftest", "test_block", "test_norm"]


@pytest.mark.parametrize(
    ("most", "others", "fails"), [(1.2, 0, False), (1.2, 1, False), (1.2, 2, True), (2.5, 0, True)]
)
def test_a_generated_case_fails_when_other_seeds_fail_too_or_by_far(most: float, others: int, fails: bool):
    """``others``: how many of three more seeds exceed their limits. The first does so by the factor ``most``."""
    seeds = []

    def check(case: Block) -> None:
        seeds.append(case.seed)
        over = most if len(seeds) == 1 else 1.1
        error = torch.tensor([[2.0 * over]])
        if len(seeds) <= 1 + others:
            check_ratios(error, torch.ones(1, 1), torch.zeros(1, 1), "drawn")

    case = Block(8, (4, 4), torch.float32, "gn", seed=5)
    if fails:
        with pytest.raises(RatiosExceeded, match="drawn: max"):
            check_again(check, case)
    else:
        check_again(check, case)
    assert len(set(seeds)) == len(seeds)


def test_a_nan_is_no_chance():
    def check(case: Block) -> None:
        check_ratios(torch.tensor([[float("nan")]]), torch.ones(1, 1), torch.zeros(1, 1), "drawn")

    with pytest.raises(RatiosExceeded) as caught:
        check_again(check, Block(8, (4, 4), torch.float32, "gn"))
    assert caught.value.most == float("inf")
