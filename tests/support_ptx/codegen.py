"""Instructions to Python source: a basic block becomes one function that works on the 32 lanes of a warp.

Registers are numpy arrays of 32 values in `R` (a list that belongs to the warp). An instruction replaces the array of
its destination and never writes into one, so that arrays may be shared. Each basic block is compiled in two forms when
it is first run: for all lanes (`M` is None), and for the lanes of a mask `M`.

The function returns the number of the next basic block, `EXIT`, `BLOCKED` (a wait that is not over, so that it is
called again), or None when the lanes went different ways and `w.pcs` says where each is.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from . import arithmetic as nx
from .syntax import SINK, FloatBits, Imm, Instr, Kernel, Label, Mem, Reg, Special, Symbol, Vec, size_of

EXIT = 1 << 30
BLOCKED = -2

DTYPES = {
    "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "u2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4",
    "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
}  # fmt: skip

# Instructions before which a basic block ends: they wait, or take lanes together.
COLLECTIVE = ("shfl", "vote", "match", "redux", "mma", "ldmatrix", "stmatrix", "wgmma", "elect")
WAITING = ("bar", "barrier", "setmaxnreg")
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")


def starts_block(instr: Instr) -> bool:
    head = instr.parts[0]
    if head in WAITING or head in COLLECTIVE:
        return True
    return head == "mbarrier" and instr.parts[1] in ("try_wait", "test_wait")


class BasicBlock:
    """A basic block: instructions that run one after the other, `first` to before `last`."""

    def __init__(self, index: int, first: int, last: int):
        self.index, self.first, self.last = index, first, last
        self.collective = False
        self.functions = {}


class Program:
    """A kernel with its basic blocks; `function(block, masked)` compiles on demand."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int], instructions: Writers):
        self.kernel, self.symbols, self.instructions = kernel, symbols, instructions
        self.types = kernel.register_types
        self.constants = []
        self.constant_index = {}
        instrs = kernel.instrs
        starts = {0, len(instrs)}
        for i, instr in enumerate(instrs):
            if instr.parts[0] in ("bra", "brx"):
                for operand in instr.operands:
                    targets = operand.items if isinstance(operand, Vec) else (operand,)
                    starts.update(target.index for target in targets if isinstance(target, Label))
            if instr.parts[0] in ("bra", "ret", "exit", "brx", "trap"):
                starts.add(i + 1)
            if starts_block(instr):
                starts.update((i, i + 1) if instr.parts[0] not in COLLECTIVE else (i,))
        ordered = sorted(s for s in starts if s <= len(instrs))
        self.blocks = [BasicBlock(n, a, b) for n, (a, b) in enumerate(pairwise(ordered))]
        self.block_at = {block.first: block.index for block in self.blocks}
        self.block_at[len(instrs)] = EXIT
        for block in self.blocks:
            head = instrs[block.first].parts[0] if block.first < block.last else ""
            block.collective = head in COLLECTIVE or head in WAITING
        self.namespace = {
            "np": np, "nx": nx, "where": np.where, "C": self.constants, "EXIT": EXIT, "BLOCKED": BLOCKED,
            "u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64, "i1": np.int8, "i2": np.int16,
            "i4": np.int32, "i8": np.int64, "f2": np.float16, "f4": np.float32, "f8": np.float64,
        }  # fmt: skip

    def function(self, block: BasicBlock, masked: bool):
        found = block.functions.get(masked)
        if found is None:
            writer = Writer(self, masked)
            for i in range(block.first, block.last):
                writer.instruction(i)
            if not writer.ended:
                writer.line(f"return {self.block_at[block.last]}")
            name = f"block{block.index}{'m' if masked else ''}"
            source = f"def {name}(w, M):\n R = w.R\n" + "".join(f" {line}\n" for line in writer.lines)
            scope = dict(self.namespace)
            exec(compile(source, f"<{self.kernel.name}>", "exec"), scope)
            found = scope[name]
            found.ptx_lines = writer.line_numbers
            block.functions[masked] = found
        return found

    def constant(self, value, dtype: str) -> str:
        key = (repr(value), dtype)
        if key not in self.constant_index:
            self.constant_index[key] = len(self.constants)
            array = np.full(32, value, dtype=dtype)
            array.setflags(write=False)
            self.constants.append(array)
        return f"C[{self.constant_index[key]}]"


def space_of(parts: list[str]) -> str:
    for part in parts:
        base = part.split("::")[0]
        if base in ("global", "shared", "param", "local", "const"):
            return "cluster" if part == "shared::cluster" else base
    return "generic"


class Writer:
    def __init__(self, program: Program, masked: bool):
        self.program, self.masked = program, masked
        self.lines: list[str] = []
        self.line_numbers = [0, 0]  # PTX line of each generated line, behind the two of the head
        self.current = 0
        self.ended = False
        self.mask = None

    def line(self, text: str):
        self.lines.append(text)
        self.line_numbers.append(self.current)

    # Operands.

    def symbol(self, operand: Symbol) -> int:
        if operand.name not in self.program.symbols:
            raise NotImplementedError(f"{operand.name}: variables in global memory")
        return self.program.symbols[operand.name] + operand.offset

    def read(self, operand, kind: str) -> str:
        dtype = DTYPES[kind]
        if isinstance(operand, Reg):
            stored = DTYPES[operand.type]
            text = f"R[{operand.index}]"
            if operand.negated:
                return f"~{text}"
            if stored == dtype:
                return text
            have, want = size_of(operand.type), size_of(kind)
            if have == want:
                return f"{text}.view({dtype})"
            if have > want and dtype[0] != "f":  # the low part of a wider register
                return f"{text}.astype({dtype})"
            raise NotImplementedError(f"read .{operand.type} as .{kind}")
        if isinstance(operand, Imm):
            value = operand.value
            if dtype[0] in "ui":
                bits = 8 * int(dtype[1])
                value = int(value) % (1 << bits)
                return self.program.constant(np.array(value, dtype=f"u{dtype[1]}").view(dtype)[()], dtype)
            if dtype == "?":
                return self.program.constant(bool(value), "bool")
            return self.program.constant(float(value), dtype)
        if isinstance(operand, FloatBits):
            raw = np.array(operand.bits, dtype=f"u{operand.size}")
            if dtype[0] in "ui":
                return self.program.constant(raw.view(f"{dtype[0]}{operand.size}")[()].astype(dtype), dtype)
            value = raw.view(f"f{operand.size}")[()]
            return self.program.constant(value if np.isfinite(value) else float(value), dtype)
        if isinstance(operand, Special):
            return f"w.special({operand.name!r}, {dtype})"
        if isinstance(operand, Symbol):
            return self.program.constant(self.symbol(operand), dtype)
        raise NotImplementedError(f"{operand} as .{kind}")

    def write(self, dest, expression: str, kind: str):
        """`expression` has the dtype of `kind`."""
        if dest is SINK:
            return
        stored, dtype = DTYPES[dest.type], DTYPES[kind]
        if stored != dtype:
            if size_of(dest.type) == size_of(kind):
                expression = f"({expression}).view({stored})"
            elif stored[0] == "f":
                raise NotImplementedError(f"write .{kind} to .{dest.type}")
            else:
                expression = f"({expression}).astype({stored})"
        if self.mask:
            expression = f"where({self.mask}, {expression}, R[{dest.index}])"
        self.line(f"R[{dest.index}] = {expression}")

    def address(self, operand: Mem) -> str:
        """An int64 array."""
        if isinstance(operand.base, Reg):
            text = self.read(operand.base, "u64" if size_of(operand.base.type) == 8 else "u32") + ".astype(i8)"
            return f"{text} + {operand.offset}" if operand.offset else text
        if isinstance(operand.base, Symbol):
            return self.program.constant(self.symbol(operand.base) + operand.offset, "i8")
        return self.program.constant(operand.base.value + operand.offset, "i8")

    # Control.

    def instruction(self, index: int):
        instr = self.program.kernel.instrs[index]
        self.current = instr.line
        pred = None
        if instr.pred:
            pred = ("~" if instr.pred.negated else "") + f"R[{instr.pred.index}]"
        self.mask = "M" if self.masked else None
        head = instr.parts[0]
        if head == "bra":
            self.branch(instr, pred, index)
            return
        if head in ("ret", "exit"):
            if pred:
                follow = self.program.block_at[index + 1]
                self.line(f"return w.branch(M, {pred}, EXIT, {follow})")
            else:
                self.line("return EXIT")
            self.ended = True
            return
        if pred:
            self.mask = f"(M & {pred})" if self.masked else pred
            # Evaluated once, as the instruction may overwrite its own predicate.
            self.line(f"m = {self.mask}")
            self.mask = "m"
        if head == "brx":
            self.branch_table(instr)
            return
        function = self.program.instructions.get(head)
        if function is None:
            raise NotImplementedError(f"line {instr.line}: the interpreter does not know {instr.text!r}")
        function(self, instr)

    def branch(self, instr: Instr, pred, index: int):
        target = self.program.block_at[instr.operands[0].index]
        if pred:
            self.line(f"return w.branch(M, {pred}, {target}, {self.program.block_at[index + 1]})")
        else:
            self.line(f"return {target}")
        self.ended = True

    def branch_table(self, instr: Instr):
        targets = [self.program.block_at[t.index] for t in instr.operands[1].items]
        self.line(f"return w.branch_table(M, {self.read(instr.operands[0], 'u32')}, {targets})")
        self.ended = True


def waiting(writer: Writer, call: str) -> None:
    """A wait that is a basic block of its own; without predicate, or with one that all lanes agree on."""
    writer.line(f"if not {call}: return BLOCKED")


Writers = dict[str, Callable[[Writer, Instr], None]]
