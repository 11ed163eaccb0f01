"""Is a register that an asynchronous matrix product still reads written meanwhile? Asked of the PTX of a kernel.

``wgmma.mma_async`` may take its operand A from registers. Until a ``wgmma.wait_group`` says that the product is done,
writing one of them is undefined (PTX ISA, "wgmma.mma_async"). Triton 3.6 and 3.7 do it in pipelined loops
(triton-lang/triton issue 9433).
"""

from __future__ import annotations

import re

_A_IN_REGISTERS = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*\{([^}]*)\}")
_WAIT = re.compile(r"wgmma\.wait_group\S*\s+(\d+)")
_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"\bbra(?:\.\w+)*\s+(\$\w+)")
_REGISTER = re.compile(r"%\w+")
_WRITES_NOTHING = ("st.", "bra", "bar", "ret", "wgmma.", "cp.", "fence", "red.", "mbarrier", "prefetch", "membar")


def _statements(ptx: str) -> list[str]:
    """Labels and instructions, in order."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    found = []
    for line in re.sub(r"//[^\n]*", "", body).replace("\t", " ").split("\n"):
        text = line.strip()
        if label := _LABEL.match(text):
            found.append(label[0])
            text = text[label.end() :].strip()
        if text:
            found.append(text)
    joined: list[str] = []  # one that reaches over several lines becomes one
    for text in found:
        open_before = joined and not joined[-1].endswith((";", ":", "{", "}"))
        if open_before:
            joined[-1] += " " + text
        else:
            joined.append(text)
    return joined


def _written(statement: str) -> set[str]:
    """The registers that a statement writes: its first operand, one or a list."""
    text = re.sub(r"^@!?%\w+\s+", "", statement)
    if text.startswith(_WRITES_NOTHING) or " " not in text:
        return set()
    operands = text.split(None, 1)[1].lstrip()
    first = operands[: operands.index("}") + 1] if operands.startswith("{") else operands.split(",")[0]
    return set(_REGISTER.findall(first)) if "[" not in first else set()


def overwritten(ptx: str) -> list[str]:
    """The statements that write a register of A while a product may still read it, in loops run through twice."""
    statements = _statements(ptx)
    labels = {text[:-1]: index for index, text in enumerate(statements) if text.endswith(":")}
    found = []
    for index, text in enumerate(statements):
        branch = _BRANCH.search(text)
        start = labels.get(branch[1], index) if branch else index
        if start < index:
            found += _walk(statements[start : index + 1] * 2)
    return found


def _walk(statements: list[str]) -> list[str]:
    open_group: list[set[str]] = []
    pending: list[list[set[str]]] = []
    found = []
    for text in statements:
        if product := _A_IN_REGISTERS.search(text):
            open_group.append(set(_REGISTER.findall(product[1])))
        elif "wgmma.commit_group" in text:
            pending.append(open_group)
            open_group = []
        elif wait := _WAIT.search(text):
            keep = int(wait[1])
            pending = pending[-keep:] if keep else []
        else:
            read = set().union(*open_group, *(registers for group in pending for registers in group))
            if read & _written(text):
                found.append(text)
    return found


def has_a_in_registers(ptx: str) -> bool:
    return _A_IN_REGISTERS.search(ptx) is not None
