"""Every instruction that the interpreter knows, by the first part of its name."""

from __future__ import annotations

from types import ModuleType

from . import instructions_lanes, instructions_memory, instructions_values
from .codegen import Writers


def of(module: ModuleType) -> Writers:
    return {name[3:]: function for name, function in vars(module).items() if name.startswith("do_")}


KNOWN: Writers = of(instructions_values) | of(instructions_memory) | of(instructions_lanes)
