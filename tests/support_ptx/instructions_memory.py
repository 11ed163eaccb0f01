"""Loads, stores, atomics, fences, addresses in a cluster, and asynchronous copies with their barriers."""

from __future__ import annotations

from .codegen import DTYPES, Writer, space_of
from .instructions_values import kind_of, reads
from .syntax import SINK, Instr, Reg, Vec, size_of


def do_ld(g: Writer, instr: Instr) -> None:
    space, kind = space_of(instr.parts), kind_of(instr)
    dest = instr.operands[0]
    items = list(dest.items) if isinstance(dest, Vec) else [dest]
    dtype = f"u{size_of(kind)}" if kind[0] in "bu" else DTYPES[kind]
    if all(isinstance(i, Reg) and size_of(i.type) == size_of(kind) for i in items):
        dtype = DTYPES[items[0].type]
    g.line(f"t = w.load({space!r}, {g.address(instr.operands[1])}, {dtype!r}, {len(items)}, {g.mask})")
    back = {v: k for k, v in reversed(list(DTYPES.items()))}
    for i, item in enumerate(items):
        g.write(item, f"t[{i}]", back[dtype])


def do_ldu(g: Writer, instr: Instr) -> None:
    do_ld(g, instr)


def do_trap(g: Writer, instr: Instr) -> None:
    g.line(f"w.trap({g.mask})")


def do_call(g: Writer, instr: Instr) -> None:
    """Functions are not modelled; what calls them in kernels here is a failed assertion."""
    g.line(f"w.trap({g.mask}, {instr.text!r})")


def do_st(g: Writer, instr: Instr) -> None:
    space, kind = space_of(instr.parts), kind_of(instr)
    if space == "param":  # an argument of a call
        g.line("pass")
        return
    source = instr.operands[1]
    items = list(source.items) if isinstance(source, Vec) else [source]
    values = ", ".join(g.read(i, kind) for i in items)
    g.line(f"w.store({space!r}, {g.address(instr.operands[0])}, {DTYPES[kind]!r}, ({values},), {g.mask})")


def do_atom(g: Writer, instr: Instr) -> None:
    space, kind = space_of(instr.parts), kind_of(instr)
    operation = next(p for p in instr.parts if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc"))
    has_result = instr.parts[0] == "atom"
    operands = instr.operands[1:] if has_result else instr.operands
    values = ", ".join(g.read(o, kind) for o in operands[1:])
    g.line(f"t = w.atomic({space!r}, {operation!r}, {g.address(operands[0])}, {kind!r}, ({values},), {g.mask})")
    if has_result:
        g.write(instr.operands[0], "t", kind)


do_red = do_atom


def do_nothing(g: Writer, instr: Instr) -> None:
    g.line("pass")


do_membar = do_discard = do_prefetch = do_prefetchu = do_applypriority = do_griddepcontrol = do_nothing
do_pmevent = do_nothing


def do_nanosleep(g: Writer, instr: Instr) -> None:
    g.line("pass")


def do_createpolicy(g: Writer, instr: Instr) -> None:
    g.write(instr.operands[0], g.program.constant(0, "u8"), "u64")


def do_fence(g: Writer, instr: Instr) -> None:
    if "proxy" in instr.op and "async" in instr.op:
        g.line(f"w.fence_proxy({g.mask})")
    else:
        g.line("pass")


def do_mapa(g: Writer, instr: Instr) -> None:
    if kind_of(instr) != "u32" or "shared::cluster" not in instr.op:
        raise NotImplementedError(instr.op)
    a, b = reads(g, instr, ["u32", "u32"])
    g.write(instr.operands[0], f"w.mapa({a}, {b}, {g.mask})", "u32")


def do_getctarank(g: Writer, instr: Instr) -> None:
    (a,) = reads(g, instr, ["u32"])
    g.write(instr.operands[0], f"w.cta_rank_of({a})", "u32")


def do_cp(g: Writer, instr: Instr) -> None:
    op, operands = instr.op, instr.operands
    if op.startswith("cp.async.bulk"):
        bulk(g, instr)
        return
    if "mbarrier" in op:
        raise NotImplementedError(op)
    if "commit_group" in op:
        g.line(f"w.copy_commit({g.mask})")
        return
    if "wait_group" in op:
        g.line(f"w.copy_wait({operands[0].value}, {g.mask})")
        return
    if "wait_all" in op:
        g.line(f"w.copy_wait(0, {g.mask}, True)")
        return
    size = operands[2].value
    source_size = "None"
    if len(operands) > 3:
        if isinstance(operands[3], Reg) and operands[3].type == "pred":
            raise NotImplementedError("cp.async with ignore-src")
        source_size = g.read(operands[3], "u32")
    to, source = g.address(operands[0]), g.address(operands[1])
    g.line(f"w.copy_async({to}, {source}, {size}, {source_size}, {g.mask}, {'cg' in instr.parts})")


def bulk(g, instr):
    op, operands = instr.op, instr.operands
    if "commit_group" in op:
        g.line(f"w.bulk_commit({g.mask})")
        return
    if "wait_group" in op:
        g.line(f"w.bulk_wait({operands[0].value}, {g.mask})")
        return
    if "prefetch" in op:
        g.line("pass")
        return
    if "tensor" not in op or "im2col" in op or "reduce" in op:
        raise NotImplementedError(op)

    def listed(items):
        return "(" + "".join(g.read(i, "s32") + ", " for i in items) + ")"

    if instr.parts[5].startswith("shared"):  # into shared memory
        blocks = "None"
        if "multicast::cluster" in op:
            blocks = g.read(operands[3], "b16")
        g.line(
            f"w.tensor_load({g.address(operands[0])}, {g.address(operands[1])}, {listed(operands[1].coordinates)}, "
            f"{g.address(operands[2])}, {blocks}, {g.mask})"
        )
    else:
        to, source = g.address(operands[0]), g.address(operands[1])
        g.line(f"w.tensor_store({source}, {to}, {listed(operands[0].coordinates)}, {g.mask})")


def do_mbarrier(g: Writer, instr: Instr) -> None:
    what, operands = instr.parts[1], instr.operands
    if what == "init":
        g.line(f"w.mbarrier_init({g.address(operands[0])}, {g.read(operands[1], 'u32')}, {g.mask})")
        return
    if what == "inval":
        g.line(f"w.mbarrier_inval({g.address(operands[0])}, {g.mask})")
        return
    space = space_of(instr.parts)
    if what == "expect_tx":
        g.line(f"w.mbarrier_expect({g.address(operands[0])}, {g.read(operands[1], 'u32')}, {space!r}, {g.mask})")
        return
    if what == "arrive":
        at, rest = operands[1], operands[2:]
        if operands[0] is not SINK and not isinstance(operands[0], (Reg,)):
            raise NotImplementedError(instr.text)
        if "noComplete" in op_flags(instr):
            raise NotImplementedError(instr.op)
        expect = "expect_tx" in instr.parts
        amount = g.read(rest[0], "u32") if rest else "None"
        g.line(f"t = w.mbarrier_arrive({g.address(at)}, {amount}, {expect}, {space!r}, {g.mask})")
        if operands[0] is not SINK:
            g.write(operands[0], "t", "u64")
        return
    if what in ("try_wait", "test_wait"):
        parity = "parity" in instr.parts
        state = g.read(operands[2], "u32" if parity else "u64")
        g.line(f"t = w.mbarrier_test({g.address(operands[1])}, {state}, {parity}, {what == 'try_wait'}, {g.mask})")
        g.line("if t is None: return BLOCKED")
        g.write(operands[0], "t", "pred")
        return
    raise NotImplementedError(instr.op)


def op_flags(instr):
    return instr.parts
