"""PTX text to kernels: instructions with resolved registers, labels and symbols.

`parse(text)` gives a `Module`. Names inside { } are local to it, as in PTX: a register or label of an inner scope
hides one of the same name outside. Debugging directives (.loc, .file, .section) are skipped.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import partial

from .syntax import (
    SINK,
    FloatBits,
    Imm,
    Instr,
    Kernel,
    Label,
    Mem,
    Module,
    Pair,
    Param,
    Reg,
    Special,
    Symbol,
    Variable,
    Vec,
    size_of,
)


def strip_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def split_top(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


SPACE = re.compile(r"\s*")
LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
PREDICATE = re.compile(r"@(!?)\s*([\w$%]+)\s+(.*)$", re.S)
FLOAT_BITS = re.compile(r"(-?)0([fd])([0-9A-Fa-f]+)$")
DECIMAL = re.compile(r"-?\d*\.\d*(e[+-]?\d+)?$")
SYMBOL = re.compile(r"([\w$.]+)\s*(?:([+-])\s*(\w+))?$")
OFFSET = re.compile(r"(.*?)\s*([+-])\s*(-?\w+)$")
NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+U?|\d+U?)$")
VARIABLE = re.compile(
    r"\.(shared|global|const|local)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?"
    r"\.([a-z]+\d+)\s+([\w$.%]+)\s*((?:\[[^\]]*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)


def integer(text: str) -> int:
    text = text.strip().rstrip("U")
    negative = text.startswith("-")
    digits = text.lstrip("-")
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xX"
    value = int(digits, 8 if octal else 16 if digits[:2].lower() == "0x" else 10)
    return -value if negative else value


class Scope:
    def __init__(self, outer: Scope | None):
        self.outer = outer
        self.registers: dict[str, tuple[int, str]] = {}
        self.ranges: dict[str, tuple[int, int, str]] = {}  # %r<100>: the first index, how many, the type
        self.labels: dict[str, int] = {}
        self.operands: dict[str, object] = {}  # those that were parsed already

    def register(self, name: str) -> tuple[int, str] | None:
        stem = name.rstrip("0123456789")
        scope: Scope | None = self
        while scope:
            if name in scope.registers:
                return scope.registers[name]
            if stem in scope.ranges and stem != name:
                first, count, kind = scope.ranges[stem]
                if (number := int(name[len(stem) :])) < count:
                    return first + number, kind
            scope = scope.outer
        return None

    def label(self, name: str) -> int | None:
        scope: Scope | None = self
        while scope:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.outer
        return None

    def listed(self, text: str) -> list:
        """The operands of an instruction."""
        return [self.operand(part) for part in split_top(text)]

    def operand(self, text: str):
        text = text.strip()
        if text not in self.operands:
            self.operands[text] = self.new_operand(text)
        return self.operands[text]

    def new_operand(self, text: str):
        if text == "_":
            return SINK
        if text.startswith("{"):
            return Vec(tuple(self.operand(part) for part in split_top(text[1:-1])))
        if text.startswith("["):
            return self.memory(text[1:-1].strip())
        if text.startswith("("):
            return Vec(tuple(self.operand(part) for part in split_top(text[1:-1])))
        if text.startswith("!"):
            found = self.operand(text[1:])
            return Reg(found.index, found.type, True)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first), self.operand(second))
        register = self.register(text)
        if register:
            return Reg(*register)
        if NUMBER.match(text):
            return Imm(integer(text))
        if match := FLOAT_BITS.match(text):
            return FloatBits(int(match.group(3), 16), 4 if match.group(2) == "f" else 8)
        if DECIMAL.match(text):
            return Imm(float(text))
        if text.startswith("%"):
            return Special(text[1:])
        at = self.label(text)
        if at is not None:
            return Label(at)
        match = SYMBOL.match(text)
        if match:
            name, sign, offset = match.groups()
            return Symbol(name, integer((sign if sign == "-" else "") + offset) if offset else 0)
        raise SyntaxError(f"operand {text!r}")

    def memory(self, text: str) -> Mem:
        parts = split_top(text)
        coordinates = ()
        if len(parts) > 1:
            coordinates = tuple(self.operand(part) for part in split_top(parts[1].strip()[1:-1]))
        match = OFFSET.match(parts[0])
        if match and NUMBER.match(match.group(3)):
            offset = integer(match.group(3)) * (-1 if match.group(2) == "-" else 1)
            return Mem(self.operand(match.group(1)), offset, coordinates)
        return Mem(self.operand(parts[0]), 0, coordinates)


def parse_variable(statement: str) -> Variable | None:
    statement = re.sub(r"^(\.(visible|extern|weak|common)\s+)+", "", statement.strip())
    match = VARIABLE.match(statement)
    if not match:
        return None
    space, align, kind, name, dims, init = match.groups()
    count = 1
    for dim in re.findall(r"\[([^\]]*)\]", dims or ""):
        count *= int(dim) if dim.strip() else 0
    unit = size_of(kind)
    data = b""
    if init:
        values = re.findall(r"0[fd][0-9A-Fa-f]+|-?0x[0-9A-Fa-f]+|-?\d+", init)
        for value in values:
            if value[:2] in ("0f", "0d"):
                data += struct.pack("<I" if unit == 4 else "<Q", int(value[2:], 16))
            else:
                data += (integer(value) % (1 << 8 * unit)).to_bytes(unit, "little")
    return Variable(name, space, count * unit, int(align or unit), data)


class BodyParser:
    def __init__(self, text: str, start: int, line: int):
        self.text, self.at, self.line = text, start, line
        self.instrs: list[Instr] = []
        self.types: list[str] = []
        self.variables: dict[str, Variable] = {}

    def skip_space(self):
        end = SPACE.match(self.text, self.at).end()
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def statement(self) -> str:
        end = self.text.index(";", self.at)
        found = self.text[self.at : end]
        self.at = end + 1
        return found

    def parse(self):
        """From behind the body's opening brace to behind its closing one."""
        scope = Scope(None)
        raw = []
        while True:
            self.skip_space()
            c = self.text[self.at]
            if c == "{":
                scope, self.at = Scope(scope), self.at + 1
                continue
            if c == "}":
                self.at += 1
                if scope.outer is None:
                    break
                scope = scope.outer
                continue
            if self.text.startswith((".loc", ".file"), self.at):
                self.at = self.text.index("\n", self.at)
                continue
            match = LABEL.match(self.text, self.at)
            if match:
                scope.labels[match.group(1)] = len(raw)
                self.at = match.end()
                continue
            line = self.line
            statement = self.statement()
            self.line += statement.count("\n")
            statement = " ".join(statement.split())
            if statement.startswith(".reg"):
                self.declare(scope, statement)
            elif statement.startswith("."):
                variable = parse_variable(statement)
                if variable:
                    self.variables[variable.name] = variable
                elif not statement.startswith((".pragma", ".branchtargets", ".param")):
                    raise SyntaxError(f"line {line}: {statement}")
            elif statement:
                raw.append((scope, line, statement))
        self.instrs = [self.instruction(*r) for r in raw]

    def declare(self, scope: Scope, statement: str):
        match = re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)$", statement)
        kind = match.group(1)
        for name in split_top(match.group(2)):
            if ranged := re.match(r"([\w$%]+)<(\d+)>$", name):
                count = int(ranged.group(2))
                scope.ranges[ranged.group(1)] = (len(self.types), count, kind)
            else:
                count = 1
                scope.registers[name] = (len(self.types), kind)
            self.types += [kind] * count

    def instruction(self, scope: Scope, line: int, statement: str) -> Instr:
        text, pred = statement, None
        if text[0] == "@":
            match = PREDICATE.match(text)
            index, kind = scope.register(match.group(2))
            pred = Reg(index, kind, bool(match.group(1)))
            text = match.group(3)
        op, _, rest = text.partition(" ")
        return Instr(op, op.split("."), partial(scope.listed, rest), pred, line, statement)


def parse_params(text: str) -> list[Param]:
    params = []
    for part in split_top(text):
        match = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.\w+)?\s*(?:\.align\s+\d+)?\s*)?"
            r"([\w$]+)(?:\[(\d+)\])?$",
            " ".join(part.split()),
        )
        align, kind, name, count = match.groups()
        unit = size_of(kind)
        params.append(Param(name, unit * int(count or 1), int(align or unit)))
    return params


ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)*\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{", re.S)
BRACE = re.compile(r"[{}]")
OTHER = re.compile(r"(?:\.visible\s+|\.extern\s+|\.weak\s+)*\.(shared|global|const)\s[^;]*;", re.S)


def parse(text: str) -> Module:
    text = strip_comments(text)
    target = re.search(r"\.target\s+([\w, ]+)", text).group(1).strip()
    module = Module(target, text)
    at = 0
    heads = re.compile(ENTRY.pattern + "|" + OTHER.pattern, re.S)
    while True:
        match = heads.search(text, at)
        if not match:
            break
        if match.group(1) is None:
            variable = parse_variable(" ".join(match.group().rstrip(";").split()))
            if variable:
                module.variables[variable.name] = variable
            at = match.end()
            continue
        depth = 1
        for brace in BRACE.finditer(text, match.end()):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                break
        module.kernels.parse[match.group(1)] = partial(parse_kernel, text, match)
        at = brace.end()
    return module


def with_kernel(module: Module, name: str, change: Callable[[str], str]) -> Module:
    """The module with another text in the place of one kernel.

    Raises:
        ValueError: the change changes nothing.
    """
    starts = [match.start() for match in ENTRY.finditer(module.text)]
    at = next(match.start() for match in ENTRY.finditer(module.text) if match.group(1) == name)
    end = min((start for start in starts if start > at), default=len(module.text))
    before = module.text[at:end]
    after = change(before)
    if after == before:
        raise ValueError(f"the change finds nothing to change in {name}")
    return parse(module.text[: starts[0]] + after)


def parse_kernel(text: str, match: re.Match) -> Kernel:
    name, params, directives = match.group(1), match.group(2), match.group(3)
    body = BodyParser(text, match.end(), text.count("\n", 0, match.end()) + 1)
    body.parse()
    found = {
        directive: [int(v) for v in re.findall(r"\d+", values)]
        for directive, values in re.findall(r"\.(\w+)([ \d,]*)", directives)
    }
    return Kernel(name, parse_params(params or ""), found, body.instrs, body.types, body.variables)
