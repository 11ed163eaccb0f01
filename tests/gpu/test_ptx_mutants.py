"""Broken copies of the kernels' PTX, each of which the interpreter has to notice: what shows that the tests of
`test_ptx_cuda.py` and `test_ptx_triton.py` can fail.

A mutant is noticed by what it says, so that none passes for another reason. The order in which warps run and copies
land is random: some mutants are noticed by one order and not by another, and get several.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import support_cases
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: interpreted kernels cannot be compiled", allow_module_level=True)

from support_block import Block, check_block
from support_ptx import parser
from support_ptx.memory import PtxError
from support_ptx_build import NO_NVCC

BFLOAT16 = torch.bfloat16
RATIO = r"x \(limit|is off by"  # the error-ratio rule, or the check of moments
Change = Callable[[str], str]


@pytest.fixture(autouse=True)
def _few_values(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(support_cases, "POOLED", 4000)


def every(pattern: str, replacement: str) -> Change:
    return lambda text: re.sub(pattern, replacement, text)


def without(pattern: str) -> Change:
    return every(pattern, "")


def one(pattern: str, replacement: str, which: int = 0) -> Change:
    """In the place of one match, counted from the end where ``which`` is negative."""

    def change(text: str) -> str:
        matches = list(re.finditer(pattern, text))
        assert matches, f"the kernel has no {pattern!r} any more: write this mutant anew"
        match = matches[which]
        return text[: match.start()] + match.expand(replacement) + text[match.end() :]

    return change


def objection(check: Callable[[int], object], tries: int) -> str:
    """What ``check(seed)`` says against the mutant, with the first seed that makes it object."""
    for seed in range(tries):
        try:
            check(seed)
        except (PtxError, AssertionError) as error:  # noqa: PERF203 (a handful of rounds)
            return str(error)
    return ""


# ---------------------------------------------------------------------------------------------------------------- CUDA


@dataclass(frozen=True)
class Mutant:
    """A change of one kernel, and what is said against it."""

    case: str
    change: Change
    says: str
    tries: int = 1


# By name: the kernel, the block that runs it, and the GPU. Panels go round in the ring several times.
KERNELS = {
    "sm80": (
        "12fused_kernelINS_4bf16ENS1_8FusedForILi64EEELNS1_7RowModeE1E",
        Block(64, (5, 7), BFLOAT16, batch=3, hidden=192),
        {"architecture": 80, "processors": 1},
    ),
    "ring": ("fused_sm90INS_4bf16ELi128E", Block(128, (5, 7), BFLOAT16, batch=3, hidden=512), {"processors": 1}),
    "cluster": ("fused_sm90INS_4bf16ELi320E", Block(320, (5, 7), BFLOAT16, batch=4, hidden=320), {"processors": 2}),
    "expand": (
        "expand_sm90INS_4bf16ELi1ELi64E",
        Block(64, (5, 7), BFLOAT16, batch=3, hidden=128),
        {"processors": 1000},
    ),
    "moments": ("slot_moments_kernelINS_4bf16E", Block(64, (5, 7), BFLOAT16, batch=3, hidden=64), {"processors": 1}),
    "maps": ("prepare_kernelILb0E", Block(64, (5, 7), BFLOAT16, batch=3, hidden=64), {"processors": 1}),
}
PACK = r"cvt\.rn\.bf16x2\.f32\s+(%r\d+), (%f\d+), (%f\d+);"
SWAPPED = r"cvt.rn.bf16x2.f32 \1, \3, \2;"
BUTTERFLY = every(r"(shfl\.sync\.bfly\.b32\s+[^,]*, %r\d+), [^,]+,", r"\1, 3,")
CUDA = {
    # Values.
    "sm80: halves of a pack exchanged": Mutant("sm80", one(PACK, SWAPPED, 3), RATIO),
    "sm90: halves of a pack exchanged": Mutant("ring", one(PACK, SWAPPED, 5), RATIO),
    "sm80: ldmatrix transposed": Mutant("sm80", one(r"x4\.shared", "x4.trans.shared", 3), RATIO),
    "sm80: k of one product in another order": Mutant(
        "sm80", one(r"(mma\.sync[^{]*\{[^}]*\}, \{)(%r\d+), (%r\d+), (%r\d+), (%r\d+)", r"\1\2, \4, \3, \5", 7), RATIO
    ),
    "sm90: second product subtracted": Mutant("ring", one(r"(%rd\d+, )p, 1, 1, 0;", r"\1p, -1, 1, 0;", -1), RATIO),
    "sm90: A of the first product transposed": Mutant("ring", one(r"p, 1, 1, 0, 0;", "p, 1, 1, 1, 0;"), RATIO),
    "sm90: coordinates of copies exchanged": Mutant(
        "ring", every(r"\], \[(%rd\d+), \{(%r\d+), (%r\d+)\}\]", r"], [\1, {\3, \2}]"), RATIO
    ),
    "maps: the wrong lanes added": Mutant("maps", BUTTERFLY, RATIO),
    "moments: the wrong lanes added": Mutant("moments", BUTTERFLY, RATIO),
    # Descriptors and addresses.
    "sm90: another swizzle in a descriptor": Mutant(
        "ring", one(r", 4611686293305360384;", ", -9223371761976803328;"), rf"swizzle|{RATIO}"
    ),
    "sm90: a descriptor 16 bytes on": Mutant(
        "ring", one(r", 4611686293305360386;", ", 4611686293305360387;"), rf"swizzle|{RATIO}"
    ),
    "sm90: a bit that means nothing in a descriptor": Mutant(
        "ring", one(r", 4611686293305360384;", ", 4611756662049538048;"), "bits that mean nothing|base offset"
    ),
    "sm80: stores 16 bytes on": Mutant(
        "sm80", every(r"st\.global\.v4\.u32(\s+)\[(%rd\d+)\]", r"st.global.v4.u32\1[\2+16]"), f"{RATIO}|an allocation"
    ),
    "sm80: ldmatrix 16 bytes on": Mutant("sm80", one(r"(ldmatrix[^\[]*\[%r\d+)\]", r"\1+16]"), RATIO),
    # Tails.
    "sm80: copies behind the last row": Mutant(
        "sm80", every(r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16), %r\d+;", r"\1, 16;"), "an allocation"
    ),
    # Waiting.
    "sm80: no waits for copies": Mutant("sm80", without(r"cp\.async\.wait_group \d;"), f"did not wait for|{RATIO}", 2),
    "sm80: no barriers": Mutant("sm80", without(r"bar\.sync\s+0;"), f"{RATIO}|an allocation", 4),
    "sm90: no proxy fences": Mutant("ring", without(r"fence\.proxy\.async\.shared::cta;"), "without a\\s+proxy fence"),
    "sm90: no fence before a product": Mutant(
        "expand", without(r"wgmma\.fence\.sync\.aligned;"), "since the last wgmma.fence"
    ),
    "sm90: no named barriers": Mutant("ring", without(r"bar\.sync (%r\d+), (%r\d+);"), f"proxy fence|wgmma|{RATIO}", 4),
    "sm90: no waits for copies": Mutant("ring", without(r"@!done bra again;"), rf"{RATIO}|wgmma|proxy", 2),
    "sm90: sums read before they are waited for": Mutant(
        "ring", one(r"wgmma\.wait_group\.sync\.aligned 0;", ""), rf"{RATIO}|wgmma"
    ),
    "sm90: a barrier that expects fewer bytes": Mutant(
        "ring",
        every(r"mov\.u32 (\s*%r\d+), 16384;", r"mov.u32 \1, 16368;"),
        f"transaction|nothing can go on|wgmma|{RATIO}",
        2,
    ),
    "sm90: more registers than there are": Mutant(
        "ring", every(r"(setmaxnreg\.inc\.sync\.aligned\.u32) \d+", r"\1 240"), "nothing can go on"
    ),
    # Clusters.
    "cluster: multicast to one thread block": Mutant(
        "cluster", every(r"mov\.u16 (\s*%rs\d+), 3;", r"mov.u16 \1, 1;"), f"nothing can go on|transaction|{RATIO}"
    ),
    "cluster: released in the own thread block alone": Mutant(
        "cluster",
        every(r"mapa\.shared::cluster\.u32 remote, (%r\d+), (%r\d+);", r"mapa.shared::cluster.u32 remote, \1, 0;"),
        "arrivals|nothing can go on",
    ),
    "cluster: no barriers": Mutant(
        "cluster", without(r"barrier\.cluster\.(arrive\.release|wait\.acquire)\.aligned;"), "barrier", 2
    ),
}


@contextmanager
def broken(kernel: str, change: Change | None) -> Iterator[None]:
    from support_ptx_cuda import host

    modules = host().modules
    (name,) = [name for name in modules if kernel in name]
    before = modules[name]
    if change:
        modules[name] = parser.with_kernel(before, name, change)
    try:
        yield
    finally:
        modules[name] = before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason=NO_NVCC)
@pytest.mark.parametrize("name", [*KERNELS, *CUDA])
def test_cuda(name):
    from support_ptx_cuda import PTX_CUDA, host, on

    mutant = CUDA.get(name)
    kernel, case, device = KERNELS[mutant.case if mutant else name]

    def check(seed: int) -> None:
        with on(**device, seed=seed):
            check_block(PTX_CUDA.block, case)
        assert any(kernel in ran.kernel for ran in host().ran), host().ran

    with broken(kernel, mutant.change if mutant else None):
        said = objection(check, mutant.tries if mutant else 1)
    assert re.search(mutant.says, said) if mutant else not said, f"SURVIVED: {said!r}"


# -------------------------------------------------------------------------------------------------------------- Triton


@dataclass(frozen=True)
class TritonMutant:
    """A change of one of the kernels that the fused block runs, on GPUs of these architectures."""

    kernel: str
    change: Change
    says: str
    architectures: tuple[int, ...] = (80, 90)
    tries: int = 1


TRITON_BLOCK = Block(64, (5, 7), BFLOAT16, batch=2, hidden=136)
FUSED = "fused_kernel"
TRITON = {
    "halves of packs exchanged": TritonMutant(
        FUSED, every(r"(cvt\.rn\.bf16x2\.f32\s+)(%\w+), (%\w+), (%\w+);", r"\1\2, \4, \3;"), RATIO
    ),
    "stores without their predicates": TritonMutant(
        FUSED, every(r"@%p\d+ st\.global", "st.global"), f"an allocation|{RATIO}"
    ),
    "loads without their predicates": TritonMutant(
        FUSED, every(r"@%p\d+ ld\.global", "ld.global"), f"an allocation|{RATIO}"
    ),
    "copies of full size behind the end": TritonMutant(
        FUSED, every(r"(cp\.async\.c[ag]\.shared\.global [^;]*, 0x\w+), %r\d+;", r"\1;"), f"an allocation|{RATIO}"
    ),
    "stores 16 bytes on": TritonMutant(
        FUSED, every(r"(st\.global\S* \[ %rd\d+ \+ )0 \]", r"\g<1>16 ]"), f"an allocation|{RATIO}"
    ),
    "no waits for copies": TritonMutant(
        FUSED, without(r"cp\.async\.wait_group\s+\S+;"), f"did not wait for|{RATIO}", tries=2
    ),
    "no barriers": TritonMutant(FUSED, without(r"bar\.sync\s+0;"), f"proxy fence|wgmma|an allocation|{RATIO}", tries=4),
    "the wrong lanes added": TritonMutant(
        "prepare_kernel", every(r"(shfl\.sync\.bfly\.b32\s+[^,]*, %r\d+), [^,]+,", r"\1, 3,"), RATIO
    ),
    "k of a product in another order": TritonMutant(
        FUSED,
        one(r"(mma\.sync\.\S+ \{[^}]*\}, \{ ?)(%r\d+), (%r\d+), (%r\d+), (%r\d+)", r"\1\2, \4, \3, \5"),
        RATIO,
        (80,),
    ),
    "no fence before products": TritonMutant(
        FUSED, without(r"wgmma\.fence\.sync\.aligned;"), "since the last wgmma.fence", (90,)
    ),
    "no proxy fences": TritonMutant(FUSED, without(r"fence\.proxy\.async\S*;"), "without a\\s+proxy fence", (90,)),
    "products not waited for": TritonMutant(
        FUSED, every(r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;"), f"wgmma|{RATIO}", (90,)
    ),
    "another swizzle in a descriptor": TritonMutant(
        FUSED, one(r", 4611686293305294848;", ", -9223371761976868864;"), f"swizzle|{RATIO}", (90,)
    ),
}
TRITON_CASES = [
    (architecture, name)
    for architecture in (80, 90)
    for name in ("", *(name for name, mutant in TRITON.items() if architecture in mutant.architectures))
]


@pytest.mark.parametrize(("architecture", "name"), TRITON_CASES)
def test_triton(architecture, name):
    pytest.importorskip("triton")
    from support_ptx_triton import PTX_TRITON, changed, on

    mutant = TRITON.get(name)
    made = []

    def change(kernel: str, text: str) -> str:
        if mutant is None or kernel != mutant.kernel:
            return text
        made.append(mutant.change(text))
        assert made[-1] != text, f"{kernel} is unchanged"
        return made[-1]

    def check(seed: int) -> None:
        with on(architecture, seed):
            check_block(PTX_TRITON.block, TRITON_BLOCK)

    token = changed.set(change)
    try:
        said = objection(check, mutant.tries if mutant else 1)
    finally:
        changed.reset(token)
    assert bool(made) == bool(mutant)
    assert re.search(mutant.says, said) if mutant else not said, f"SURVIVED: {said!r}"
