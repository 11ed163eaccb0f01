"""What PTX text is parsed into: operands, instructions, kernels, modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Reg:
    index: int
    type: str  # as declared: b32, f32, pred, ...
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    value: int | float


@dataclass(frozen=True)
class FloatBits:  # 0f3F800000 or 0d...
    bits: int
    size: int


@dataclass(frozen=True)
class Special:
    name: str  # tid.x, laneid, ...


@dataclass(frozen=True)
class Symbol:
    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Mem:
    base: object  # Reg, Symbol or Imm
    offset: int
    coordinates: tuple = ()  # of a tensor copy


@dataclass(frozen=True)
class Pair:  # p|q
    first: object
    second: object


@dataclass(frozen=True)
class Label:
    index: int  # of the instruction it stands before


SINK = Imm(0)  # `_`, a result that nobody wants


@dataclass
class Instr:
    """An instruction. Its operands are parsed when they are first asked for: most of a kernel is never run."""

    op: str
    parts: list[str]
    parse: Callable[[], list]
    pred: Reg | None
    line: int
    text: str

    @cached_property
    def operands(self) -> list:
        return self.parse()


@dataclass
class Param:
    name: str
    size: int
    align: int


@dataclass
class Variable:
    name: str
    space: str
    size: int
    align: int
    data: bytes = b""


@dataclass
class Kernel:
    name: str
    params: list[Param]
    directives: dict[str, list[int]]
    instrs: list[Instr]
    register_types: list[str]
    variables: dict[str, Variable]  # of the kernel itself: .shared, .local
    program: object = None  # once it is prepared for a launch


class Kernels:
    """By name. A body is parsed when it is asked for, and the last ones are kept: each takes some megabytes."""

    KEPT = 12

    def __init__(self) -> None:
        self.parse: dict[str, Callable[[], Kernel]] = {}
        self.kept: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        found = self.kept.pop(name, None) or self.parse[name]()
        self.kept[name] = found
        if len(self.kept) > self.KEPT:
            del self.kept[next(iter(self.kept))]
        return found

    def names(self) -> list[str]:
        return list(self.parse)


@dataclass
class Module:
    target: str
    text: str  # without comments
    kernels: Kernels = field(default_factory=Kernels)
    variables: dict[str, Variable] = field(default_factory=dict)


SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def size_of(kind: str) -> int:
    if kind == "pred":
        return 1
    return SIZES[re.sub(r"^[a-z]+", "", kind).removesuffix("x2")] * (2 if kind.endswith("x2") else 1)
