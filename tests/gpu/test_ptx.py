"""The interpreter of PTX by itself, on a few lines: values against Python's own integers, and what it objects to.

That it gets matrix products and copies right is shown by the kernels (`test_ptx_cuda.py`, `test_ptx_triton.py`).
"""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from support_ptx import parser
from support_ptx.launch import Launch
from support_ptx.memory import GlobalMemory, PtxError

THREADS = 64
Y = 0x9E3779B9
# Thread t has x[t] in %r2, y in %r4 and its number in %r1; what is in %r3 at the end is its result.
KERNEL = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{
  .reg .pred %p<4>;
  .reg .b32 %r<16>;
  .reg .b64 %rd<8>;
  ld.param.u64 %rd1, [kernel_param_0];
  ld.param.u64 %rd2, [kernel_param_1];
  mov.u32 %r1, %tid.x;
  mov.u32 %r4, 0x9E3779B9;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  ld.global.u32 %r2, [%rd4];
  BODY
  st.global.u32 [%rd5], %r3;
  ret;
}
"""


LENGTH = """mov.u32 %r3, 0;
LOOP:
  setp.eq.u32 %p1, %r2, 0;
  @%p1 bra DONE;
  shr.u32 %r2, %r2, 1;
  add.u32 %r3, %r3, 1;
  bra LOOP;
DONE:
"""


def run(body: str, x: list[int], seed: int = 0) -> list[int]:
    memory = GlobalMemory(1 << 16)
    source, target = memory.put(np.array(x, np.uint32)), memory.allocate(4 * THREADS)
    module = parser.parse(KERNEL.replace("BODY", body))
    Launch(module, "kernel", (1, 1, 1), (THREADS, 1, 1), 0, struct.pack("<2Q", source, target), memory, seed=seed).run()
    return memory.get(target, np.uint32, (THREADS,)).tolist()


@pytest.fixture
def x() -> list[int]:
    """Numbers of all lengths."""
    chance = random.Random(0)
    return [chance.getrandbits(32) >> chance.randrange(32) for _ in range(THREADS)]


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("mul.lo.u32 %r3, %r2, %r4;", lambda x, t: x * Y),
        ("mul.hi.u32 %r3, %r2, %r4;", lambda x, t: x * Y >> 32),
        ("mul.hi.s32 %r3, %r2, %r4;", lambda x, t: signed(x) * signed(Y) >> 32),
        ("mad.lo.s32 %r3, %r2, %r4, %r1;", lambda x, t: x * Y + t),
        ("div.s32 %r3, %r4, %r2;", lambda x, t: quotient(signed(Y), signed(x)) if x else -1),
        ("rem.u32 %r3, %r2, 1000;", lambda x, t: x % 1000),
        ("shr.s32 %r3, %r2, %r1;", lambda x, t: signed(x) >> min(t, 31)),
        ("shl.b32 %r3, %r2, %r1;", lambda x, t: x << t if t < 32 else 0),
        ("shf.l.wrap.b32 %r3, %r2, %r4, 7;", lambda x, t: (Y << 32 | x) << 7 >> 32),
        ("prmt.b32 %r3, %r2, %r4, 0x7160;",
         lambda x, t: x & 0xFF | (Y >> 16 & 0xFF) << 8 | (x >> 8 & 0xFF) << 16 | (Y >> 24) << 24),
        ("bfe.u32 %r3, %r2, 5, 9;", lambda x, t: x >> 5 & 511),
        ("bfi.b32 %r3, %r2, %r4, 8, 4;", lambda x, t: Y & ~0xF00 | (x & 15) << 8),
        ("lop3.b32 %r3, %r2, %r4, %r1, 0x96;", lambda x, t: x ^ Y ^ t),
        ("popc.b32 %r3, %r2;", lambda x, t: x.bit_count()),
        ("clz.b32 %r3, %r2;", lambda x, t: 32 - x.bit_length()),
        ("brev.b32 %r3, %r2;", lambda x, t: int(f"{x:032b}"[::-1], 2)),
        ("setp.lt.s32 %p1, %r2, %r4; selp.b32 %r3, %r1, 7, %p1;", lambda x, t: t if signed(x) < signed(Y) else 7),
        ("mov.u32 %r3, 5; setp.gt.u32 %p1, %r1, 9; @%p1 add.u32 %r3, %r3, %r1;", lambda x, t: 5 + t * (t > 9)),
        # Names in braces hide those outside.
        ("mov.u32 %r3, 1; { .reg .b32 %r<4>; mov.u32 %r3, 2; }", lambda x, t: 1),
        # Lanes part, and meet again.
        (LENGTH, lambda x, t: x.bit_length()),
    ],
)  # fmt: skip
def test_instruction(instruction, expected, x):
    assert run(instruction, x) == [expected(value, t) % (1 << 32) for t, value in enumerate(x)]


@pytest.mark.parametrize("seed", range(3))
def test_lanes_and_warps_see_each_other(x, seed):
    found = run("shfl.sync.bfly.b32 %r3, %r2, 5, 31, -1;", x, seed)
    assert found == [x[t ^ 5] for t in range(THREADS)]
    swap = (
        ".shared .align 4 .b8 room[256]; mov.u32 %r5, room; shl.b32 %r6, %r1, 2; add.u32 %r7, %r5, %r6;"
        " st.shared.u32 [%r7], %r2; bar.sync 0; xor.b32 %r6, %r6, 128; add.u32 %r7, %r5, %r6; ld.shared.u32 %r3, [%r7];"
    )
    assert run(swap, x, seed) == [x[t ^ 32] for t in range(THREADS)]
    unswapped = [run(swap.replace("bar.sync 0;", ""), x, s) for s in range(8)]
    assert any(found != unswapped[0] for found in unswapped), "without the barrier the order of the warps shows"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("ld.global.u32 %r3, [%rd4+256];", "bytes from the start of an allocation of 256"),
        ("ld.global.u32 %r3, [%rd4+2];", "misaligned load of 4 bytes"),
        ("mov.u32 %r5, 4096; ld.shared.u32 %r3, [%r5];", "shared"),
        ("mov.u32 %r3, 0; bar.sync 0, 96;", r"nothing can go on:\n  thread block 0, warp \d waits at line \d+"),
        ("mov.u32 %r3, 0; setp.eq.u32 %p1, %r1, 3; @%p1 trap;", "trap"),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 bra ON; bra OFF;\nON: shfl.sync.idx.b32 %r3, %r2, 20, 31, 255;\nOFF:",
         "shfl from a lane that does not take part"),
    ],
)  # fmt: skip
def test_what_is_undefined_on_a_gpu_is_an_error(body, says, x):
    with pytest.raises(PtxError, match=says) as caught:
        run(body, x)
    assert "nothing can go on" in says or any("kernel, PTX line" in note for note in caught.value.__notes__)


def test_an_unknown_instruction_is_named_with_its_line(x):
    with pytest.raises(NotImplementedError, match=r"line 18: .*'vabsdiff4\.u32\.u32\.u32 %r3, %r2, %r4, %r1'"):
        run("vabsdiff4.u32.u32.u32 %r3, %r2, %r4, %r1;", x)
