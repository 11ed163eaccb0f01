"""Arithmetic, logic, comparison, moves and conversion.

Here and in the other `instructions_*.py` there is one function for each instruction. It writes the Python for it
through a `codegen.Writer` (`g`).
"""

from __future__ import annotations

from .codegen import DTYPES, ROUNDINGS, Writer
from .syntax import Instr, Pair, Reg, Vec, size_of

HALF = ("f16", "bf16", "f16x2", "bf16x2")


def kind_of(instr) -> str:
    return instr.parts[-1]


def reads(g, instr, kinds):
    return [g.read(o, k) for o, k in zip(instr.operands[1:], kinds, strict=False)]


def half(g, instr, name, count):
    kind = kind_of(instr)
    function = "nx.half2_op" if kind.endswith("x2") else "nx.half_op"
    values = ", ".join(reads(g, instr, [kind] * count))
    expression = f"{function}({name!r}, {kind.removesuffix('x2')!r}, {values})"
    if "relu" in instr.parts:
        raise NotImplementedError(instr.op)
    g.write(instr.operands[0], expression, kind)


def binary(operator, name):
    def do(g: Writer, instr: Instr) -> None:
        kind = kind_of(instr)
        if kind in HALF:
            half(g, instr, name, 2)
            return
        if "cc" in instr.parts or any(r in instr.parts for r in ("rz", "rm", "rp")):
            raise NotImplementedError(instr.op)
        unsigned = {"s32": "u32", "s64": "u64", "s16": "u16"}.get(kind, kind)
        a, b = reads(g, instr, [unsigned] * 2)
        text = f"{a} {operator} {b}"
        if "sat" in instr.parts:
            text = f"np.clip(np.nan_to_num({text}), f4(0), f4(1))"
        g.write(instr.operands[0], text, unsigned)

    return do


do_add, do_sub = binary("+", "add"), binary("-", "sub")


def do_mul(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    if kind in HALF or kind in ("f32", "f64"):
        binary("*", "mul")(g, instr)
        return
    if "wide" in instr.parts:
        g.write(instr.operands[0], wide_product(g, instr, kind), wide_of(kind))
        return
    if "hi" in instr.parts:
        a, b = reads(g, instr, [kind] * 2)
        g.write(instr.operands[0], f"nx.mul_hi({a}, {b}, {kind!r})", "u" + kind[1:])
        return
    binary("*", "mul")(g, instr)
    return


def wide_of(kind):
    return f"{kind[0]}{2 * int(kind[1:])}"


def wide_product(g, instr, kind):
    wide = DTYPES[wide_of(kind)]
    a, b = reads(g, instr, [kind] * 2)
    return f"{a}.astype({wide}) * {b}.astype({wide})"


def do_mad(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    if kind in ("f32", "f64"):
        do_fma(g, instr)
        return
    if "wide" in instr.parts:
        wide = wide_of(kind)
        g.write(instr.operands[0], f"{wide_product(g, instr, kind)} + {g.read(instr.operands[3], wide)}", wide)
        return
    unsigned = "u" + kind[1:]
    if "hi" in instr.parts:
        a, b = reads(g, instr, [kind] * 2)
        text = f"nx.mul_hi({a}, {b}, {kind!r}) + {g.read(instr.operands[3], unsigned)}"
    else:
        a, b, c = reads(g, instr, [unsigned] * 3)
        text = f"{a} * {b} + {c}"
    g.write(instr.operands[0], text, unsigned)


def do_fma(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    if kind in HALF:
        half(g, instr, "fma", 3)
        return
    a, b, c = reads(g, instr, [kind] * 3)
    g.write(instr.operands[0], f"nx.fma32({a}, {b}, {c})" if kind == "f32" else f"{a} * {b} + {c}", kind)


def do_div(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, b = reads(g, instr, [kind] * 2)
    g.write(instr.operands[0], f"{a} / {b}" if kind[0] == "f" else f"nx.divide({a}, {b})", kind)


def do_rem(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, b = reads(g, instr, [kind] * 2)
    g.write(instr.operands[0], f"nx.remainder({a}, {b})", kind)


def minmax(quiet, loud, name):
    def do(g: Writer, instr: Instr) -> None:
        kind = kind_of(instr)
        if kind in HALF:
            half(g, instr, name, 2)
            return
        a, b = reads(g, instr, [kind] * 2)
        if len(instr.operands) == 4:
            raise NotImplementedError(instr.op)
        function = loud if "NaN" in instr.parts or kind[0] != "f" else quiet
        g.write(instr.operands[0], f"np.{function}({a}, {b})", kind)

    return do


do_min, do_max = minmax("fmin", "minimum", "min"), minmax("fmax", "maximum", "max")


def unary(expression, name=""):
    def do(g: Writer, instr: Instr) -> None:
        kind = kind_of(instr)
        if kind in HALF:
            half(g, instr, name, 1)
            return
        (a,) = reads(g, instr, [kind])
        g.write(instr.operands[0], expression.format(a=a), kind)

    return do


do_neg, do_abs = unary("-{a}", "neg"), unary("np.abs({a})", "abs")


def do_copysign(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, b = reads(g, instr, [kind] * 2)
    g.write(instr.operands[0], f"np.copysign({b}, {a})", kind)


do_rcp = unary("f4(1) / {a}")
do_sqrt = unary("np.sqrt({a})")
do_rsqrt = unary("(1 / np.sqrt({a}.astype(f8))).astype(f4)")
do_ex2 = unary("np.exp2({a}.astype(f8)).astype(f4)", "ex2")
do_lg2 = unary("np.log2({a}.astype(f8)).astype(f4)")
do_sin = unary("np.sin({a}.astype(f8)).astype(f4)")
do_cos = unary("np.cos({a}.astype(f8)).astype(f4)")
do_tanh = unary("np.tanh({a}.astype(f8)).astype(f4)", "tanh")


def logic(operator):
    def do(g: Writer, instr: Instr) -> None:
        kind = kind_of(instr)
        a, b = reads(g, instr, [kind] * 2)
        g.write(instr.operands[0], f"{a} {operator} {b}", kind)

    return do


do_and, do_or, do_xor = logic("&"), logic("|"), logic("^")
do_not = unary("~{a}")


def do_lop3(g: Writer, instr: Instr) -> None:
    a, b, c = reads(g, instr, ["b32"] * 3)
    g.write(instr.operands[0], f"nx.lop3({a}, {b}, {c}, {instr.operands[4].value})", "b32")


def do_shl(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, b = reads(g, instr, [kind, "u32"])
    g.write(instr.operands[0], f"{a} << {b}{widened(kind)}", kind)


def widened(kind):
    return {"16": ".astype(u2)", "64": ".astype(u8)"}.get(kind[1:], "")


def do_shr(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, b = reads(g, instr, [kind, "u32"])
    if kind[0] == "s":
        count = f"np.minimum({b}, u4({8 * size_of(kind) - 1})).astype({DTYPES[kind]})"
    else:
        count = b + widened(kind)
    g.write(instr.operands[0], f"{a} >> {count}", kind)


def do_shf(g: Writer, instr: Instr) -> None:
    low, high, shift = reads(g, instr, ["b32", "b32", "u32"])
    left, wrap = instr.parts[1] == "l", instr.parts[2] == "wrap"
    g.write(instr.operands[0], f"nx.funnel({low}, {high}, {shift}, {left}, {wrap})", "b32")


def do_prmt(g: Writer, instr: Instr) -> None:
    a, b, c = reads(g, instr, ["b32"] * 3)
    if len(instr.parts) != 2:
        raise NotImplementedError(instr.op)
    g.write(instr.operands[0], f"nx.prmt({a}, {b}, {c})", "b32")


def do_bfe(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, b, c = reads(g, instr, ["b" + kind[1:], "u32", "u32"])
    g.write(instr.operands[0], f"nx.bfe({a}, {b}, {c}, {kind!r})", "b" + kind[1:])


def do_bfi(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, b, c, d = reads(g, instr, [kind, kind, "u32", "u32"])
    g.write(instr.operands[0], f"nx.bfi({a}, {b}, {c}, {d})", kind)


def counted(name):
    def do(g: Writer, instr: Instr) -> None:
        (a,) = reads(g, instr, [kind_of(instr)])
        g.write(instr.operands[0], f"nx.{name}({a})", kind_of(instr) if name == "brev" else "u32")

    return do


do_popc, do_clz, do_brev, do_bfind = counted("popc"), counted("clz"), counted("brev"), counted("bfind")


COMPARE = {
    "eq": "{a} == {b}", "ne": "{a} != {b}", "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}",
    "ge": "{a} >= {b}",
    "lo": "{a} < {b}", "ls": "{a} <= {b}", "hi": "{a} > {b}", "hs": "{a} >= {b}",
    "equ": "~({a} < {b}) & ~({a} > {b})", "neu": "{a} != {b}", "ltu": "~({a} >= {b})", "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})", "geu": "~({a} < {b})", "num": "~(np.isnan({a}) | np.isnan({b}))",
    "nan": "np.isnan({a}) | np.isnan({b})",
}  # fmt: skip


def do_setp(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, b = reads(g, instr, [kind] * 2)
    if kind in ("f16", "bf16"):
        a, b = (f"nx.widen({v}, {kind!r})" for v in (a, b))
    compare = COMPARE[instr.parts[1]]
    if instr.parts[1] == "ne" and kind[-3:] in ("f32", "f64", "f16"):
        compare = "({a} < {b}) | ({a} > {b})"
    text = f"({compare.format(a=a, b=b)})"
    joins = {"and": "&", "or": "|", "xor": "^"}
    first, second = instr.operands[0], None
    if isinstance(first, Pair):
        first, second = first.first, first.second
    if len(instr.parts) > 3 and instr.parts[2] in joins:
        join, other = joins[instr.parts[2]], g.read(instr.operands[3], "pred")
        g.line(f"c, q = {text}, {other}")
        if second is not None:
            g.write(second, f"~c {join} q", "pred")
        g.write(first, f"c {join} q", "pred")
        return
    g.line(f"c = {text}")
    if second is not None:
        g.write(second, "~c", "pred")
    g.write(first, "c", "pred")


def do_selp(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, b, p = reads(g, instr, [kind, kind, "pred"])
    g.write(instr.operands[0], f"where({p}, {a}, {b})", kind)


def do_mov(g: Writer, instr: Instr) -> None:
    kind, dest, source = kind_of(instr), instr.operands[0], instr.operands[1]
    if isinstance(dest, Vec):
        part = f"b{8 * size_of(kind) // len(dest.items)}"
        g.line(f"t = {g.read(source, kind)}")
        for i, item in enumerate(dest.items):
            shift = 8 * size_of(part) * i
            g.write(item, f"(t >> {DTYPES[kind]}({shift})).astype({DTYPES[part]})", part)
        return
    if isinstance(source, Vec):
        part, to = f"b{8 * size_of(kind) // len(source.items)}", DTYPES[kind]
        terms = [
            f"({g.read(item, part)}.astype({to}) << {to}({8 * size_of(part) * i}))"
            for i, item in enumerate(source.items)
        ]
        g.write(dest, " | ".join(terms), kind)
        return
    g.write(dest, g.read(source, kind), kind)


def do_cvta(g: Writer, instr: Instr) -> None:
    g.write(instr.operands[0], f"w.cvta({g.read(instr.operands[1], 'u64')}, {instr.parts[1:-1]!r})", "u64")


def do_isspacep(g: Writer, instr: Instr) -> None:
    g.write(instr.operands[0], f"w.isspace({g.read(instr.operands[1], 'u64')}, {instr.parts[1]!r})", "pred")


def do_cvt(g: Writer, instr: Instr) -> None:
    to, source = instr.parts[-2], instr.parts[-1]
    rounding = next((p for p in instr.parts if p in ROUNDINGS), "")
    dest, a = instr.operands[0], g.read(instr.operands[1], source)
    if "relu" in instr.parts or "satfinite" in instr.parts:
        raise NotImplementedError(instr.op)
    if to in ("bf16x2", "f16x2"):  # the first operand is the upper half
        kind, b = to.removesuffix("x2"), g.read(instr.operands[2], "f32")
        g.write(dest, f"nx.joined(nx.narrow({b}, {kind!r}), nx.narrow({a}, {kind!r}))", to)
        return
    if to == "tf32":
        g.write(dest, f"nx.tf32({a}, {rounding == 'rna'}).view(u4)", "b32")
        return
    if source in ("f16", "bf16"):
        a, source = f"nx.widen({a}, {source!r})", "f32"
    float_to, float_from = to[0] == "f" or to == "bf16", source[0] == "f"
    if to in ("f16", "bf16"):
        text = f"nx.narrow({a}, {to!r})"
    elif float_to and float_from:
        if rounding.endswith("i"):
            a = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}[rounding] + f"({a})"
        text = f"{a}.astype({DTYPES[to]})"
        if "sat" in instr.parts:
            text = f"np.clip(np.nan_to_num({text}), 0, 1).astype({DTYPES[to]})"
    elif float_from:
        text = f"nx.to_integer({a}, {to!r}, {rounding!r})"
    elif "sat" in instr.parts:
        raise NotImplementedError(instr.op)
    else:
        text = f"{a}.astype({DTYPES[to]})"
    if isinstance(dest, Reg) and not float_to and size_of(dest.type) > size_of(to):
        # Extended to the register by its sign.
        sign, size = to[0] == "s", size_of(dest.type)
        g.write(dest, f"({text}).astype({'i' if sign else 'u'}{size})", f"{'s' if sign else 'u'}{8 * size}")
        return
    g.write(dest, text, to)
