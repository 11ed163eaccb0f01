"""Where lanes and warps work together: shuffles, votes, barriers, and the matrix units."""

from __future__ import annotations

from .codegen import Writer, waiting
from .instructions_values import kind_of
from .syntax import Instr, Pair, Vec


def do_shfl(g: Writer, instr: Instr) -> None:
    dest, second = instr.operands[0], None
    if isinstance(dest, Pair):
        dest, second = dest.first, dest.second
    a, b, c = (g.read(o, "b32") for o in instr.operands[1:4])
    g.line(f"t, v = w.shuffle({instr.parts[2]!r}, {a}, {b}, {c}, {g.read(instr.operands[4], 'b32')}, {g.mask})")
    g.write(dest, "t", "b32")
    if second is not None:
        g.write(second, "v", "pred")


def do_vote(g: Writer, instr: Instr) -> None:
    p, members = g.read(instr.operands[1], "pred"), g.read(instr.operands[2], "b32")
    kind = "b32" if instr.parts[2] == "ballot" else "pred"
    g.write(instr.operands[0], f"w.vote({instr.parts[2]!r}, {p}, {members}, {g.mask})", kind)


def do_redux(g: Writer, instr: Instr) -> None:
    kind = kind_of(instr)
    a, members = g.read(instr.operands[1], kind), g.read(instr.operands[2], "b32")
    g.write(instr.operands[0], f"w.redux({instr.parts[2]!r}, {a}, {members}, {g.mask})", kind)


def do_activemask(g: Writer, instr: Instr) -> None:
    g.write(instr.operands[0], f"w.activemask({g.mask})", "b32")


def do_elect(g: Writer, instr: Instr) -> None:
    dest = instr.operands[0]
    g.line(f"t, v = w.elect({g.mask})")
    g.write(dest.first, "t", "b32")
    g.write(dest.second, "v", "pred")


def do_bar(g: Writer, instr: Instr) -> None:
    if "warp" in instr.parts:
        g.line("pass")  # `collective` holds it back until all lanes are here
        return
    name = "arrive" if "arrive" in instr.parts else "sync"
    if "red" in instr.parts:
        raise NotImplementedError(instr.op)
    barrier = g.read(instr.operands[0], "u32")
    count = g.read(instr.operands[1], "u32") if len(instr.operands) > 1 else "None"
    waiting(g, f"w.barrier({name!r}, {barrier}, {count}, {g.mask})")


def do_barrier(g: Writer, instr: Instr) -> None:
    if instr.parts[1] != "cluster":
        do_bar(g, instr)
        return
    waiting(g, f"w.cluster_barrier({instr.parts[2]!r}, {g.mask})")


def do_setmaxnreg(g: Writer, instr: Instr) -> None:
    waiting(g, f"w.set_registers({instr.parts[1]!r}, {instr.operands[0].value}, {g.mask})")


# The matrix units: see tensor_core.py and wgmma.py.


def do_ldmatrix(g: Writer, instr: Instr) -> None:
    dest = instr.operands[0]
    items = dest.items if isinstance(dest, Vec) else (dest,)
    if "m8n8" not in instr.parts or "b16" not in instr.parts:
        raise NotImplementedError(instr.op)
    g.line(f"t = w.ldmatrix({g.address(instr.operands[1])}, {len(items)}, {'trans' in instr.parts}, {g.mask})")
    for i, item in enumerate(items):
        g.write(item, f"t[{i}]", "b32")


def do_stmatrix(g: Writer, instr: Instr) -> None:
    source = instr.operands[1]
    items = source.items if isinstance(source, Vec) else (source,)
    if "m8n8" not in instr.parts or "b16" not in instr.parts:
        raise NotImplementedError(instr.op)
    values = ", ".join(g.read(i, "b32") for i in items)
    g.line(f"w.stmatrix({g.address(instr.operands[0])}, ({values},), {'trans' in instr.parts}, {g.mask})")


def do_mma(g: Writer, instr: Instr) -> None:
    d, a, b, c = instr.operands[:4]
    shape, kinds = instr.parts[3], instr.parts[-4:]
    if instr.parts[4:6] != ["row", "col"]:
        raise NotImplementedError(instr.op)

    def listed(vector, kind):
        return "(" + "".join(g.read(i, kind) + ", " for i in vector.items) + ")"

    sums = "f32" if kinds[0] == "f32" else "b32"
    g.line(f"t = w.mma({shape!r}, {kinds!r}, {listed(a, 'b32')}, {listed(b, 'b32')}, {listed(c, sums)}, {g.mask})")
    for i, item in enumerate(d.items):
        g.write(item, f"t[{i}]", sums)


def do_wgmma(g: Writer, instr: Instr) -> None:
    what = instr.parts[1]
    if what == "fence":
        g.line(f"w.wgmma_fence({g.mask})")
        return
    if what == "commit_group":
        g.line(f"w.wgmma_commit({g.mask})")
        return
    if what == "wait_group":
        waiting(g, f"w.wgmma_wait({instr.operands[0].value}, {g.mask})")
        return
    shape, kinds = instr.parts[4], instr.parts[5:8]
    d, a, b, scale = instr.operands[:4]
    rest = [o.value for o in instr.operands[4:]]
    registers = tuple(i.index for i in d.items)
    if isinstance(a, Vec):
        source = f"None, {tuple(i.index for i in a.items)}"
        rest = [*rest[:2], 0, *(rest[2:] or [0])]
    else:
        source = f"{g.read(a, 'b64')}, ()"
        rest = rest if len(rest) == 4 else [*rest, 0, 0]
    g.line(
        f"w.wgmma({g.current}, {shape!r}, {kinds!r}, {registers}, {source}, {g.read(b, 'b64')}, "
        f"{g.read(scale, 'pred')}, {tuple(rest)}, {g.mask})"
    )
