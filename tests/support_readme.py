"""README.md as data: its Python blocks by section, the commands that it shows, and its links."""

from __future__ import annotations

import ast
import builtins
import re
from dataclasses import dataclass

from support_paths import ROOT

README = ROOT / "README.md"
PROGRAMS = ("riformer-kernels", "make", "python", "python3", "pytest", "pip")


@dataclass(frozen=True)
class Block:
    """A fenced Python block: its section, the line of README.md where its code begins, and the code."""

    section: str
    line: int
    code: str


def fences(text: str) -> list[tuple[str, str, int, str]]:
    """Every fenced block of ``text``: section, language, first line of its content, content."""
    found, section, language, content, start = [], "", None, [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, content, start = line[3:].strip(), [], number + 1
            else:
                found.append((section, language, start, "\n".join(content)))
                language = None
        elif language is not None:
            content.append(line)
        elif heading := re.match(r"#+ +(.+)", line):
            section = heading[1]
    assert language is None, "a fenced block does not end"
    return found


def python_blocks(text: str) -> list[Block]:
    return [Block(section, line, code) for section, language, line, code in fences(text) if language == "python"]


def free_names(code: str) -> set[str]:
    """The names that ``code`` reads before it sets them, roughly: module level, in the order of the statements."""
    known, free = set(dir(builtins)), set()
    for statement in ast.parse(code).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        free |= {node.id for node in names if isinstance(node.ctx, ast.Load)} - known - _bound(statement)
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)} | _bound(statement)
    return free


def _bound(statement: ast.stmt) -> set[str]:
    """What ``statement`` defines by importing it, as a function or a class, or with ``as``, arguments included."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.withitem | ast.comprehension):
            target = node.optional_vars if isinstance(node, ast.withitem) else node.target
            found |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)} if target else set()
    return found


def commands(text: str) -> list[str]:
    """Every command line that ``text`` shows, in blocks or as inline code, without its comment."""
    lines = re.findall(r"^(?: {4}|\$ )(.+)$", text, re.MULTILINE)
    lines += [line for _, language, _, code in fences(text) if language != "python" for line in code.splitlines()]
    # A line break within inline code is a space.
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    stripped = [re.sub(r"\s+# .*$", "", line.strip().removeprefix("$ ")) for line in lines]
    return sorted({line for line in stripped if line.split(" ")[0] in PROGRAMS and line not in PROGRAMS})


def links(text: str) -> list[str]:
    """The files of this repository that ``text`` links to."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return sorted({target.partition("#")[0] for target in targets if "://" not in target and target[0] != "#"})
