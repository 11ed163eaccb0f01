"""Asynchronous matrix products on Hopper: no Triton kernel writes a register that one of them may still be reading."""

from __future__ import annotations

import os

import pytest
import torch
from support_wgmma import has_a_in_registers, overwritten

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: interpreted kernels cannot be compiled", allow_module_level=True)
pytest.importorskip("triton")

from riformer_kernels.backends.triton import ahead

PTX = """
.visible .entry kernel()
{
$L__BB0_1:
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r9];
	wgmma.fence.sync.aligned;
	// begin inline asm
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, %rd1, p, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned GROUPS;
	add.s32 %r9, %r9, 64;
	@%p1 bra $L__BB0_1;
	ret;
}
"""


@pytest.mark.parametrize(("groups", "statements"), [(0, []), (1, ["ldmatrix"]), (3, ["ldmatrix"])])
def test_the_check_sees_what_a_wait_leaves_running(groups, statements):
    ptx = PTX.replace("GROUPS", str(groups))
    assert has_a_in_registers(ptx)
    assert [text.split(".")[0] for text in overwritten(ptx)] == statements


def test_the_check_sees_other_instructions_and_guards():
    ptx = PTX.replace("GROUPS", "1").replace("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}", "MOVE")
    for move in ("mov.b32 %r3, %r20;", "@%p2 cvt.rn.bf16x2.f32 %r3, %f8, %f9;", "mov.b64 {%r3, %r21}, %rd7;"):
        assert overwritten(ptx.replace("MOVE, [%r9];", move)) == [move]
    assert not overwritten(ptx.replace("MOVE, [%r9];", "st.shared.b32 [%r3], %r20;"))


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("per_position", [False, True], ids=["gn", "ln"])
def test_no_kernel_overwrites_what_a_product_reads(per_position, parameters):
    seen, wrong = 0, []
    for launch in ahead.network(90, torch.bfloat16, parameters=parameters, per_position=per_position, training=True):
        ptx = ahead.compiled_kernel(launch, 90).asm["ptx"]
        seen += has_a_in_registers(ptx)
        wrong += [f"{launch.kernel.__name__} C={ahead.width_of(launch)}: {text}" for text in overwritten(ptx)[:1]]
    assert seen >= 8, "the fused and the expand kernels feed A from registers; the check looks past them"
    assert not wrong, "\n".join(wrong)
