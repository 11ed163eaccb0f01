"""Environment variables that limit a peer to an instruction set, and the peers that no variable limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from riformer_kernels.backends import cpu
from riformer_kernels.errors import BackendError


@dataclass(frozen=True)
class InstructionSet:
    """An instruction set that the library is compiled for, and how everybody is limited to it in a comparison.

    Attributes:
        name: as the library has it.
        architecture: of the processors that have it; sets of different ones never meet.
        hardware: whether it is an extension of the processor, which peers can use as well, and changes what is
            compared. Plain C++ and emulated instructions are for correctness: nobody is measured with them.
        environment: variables of a worker that may not use more than this set; none for the best set, which needs no
            limit.
        march: what torch.compile may compile for under this limit.
        dtypes: what is compared under this limit.
    """

    name: str
    architecture: str = "x86"
    hardware: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    march: str = ""
    dtypes: tuple[str, ...] = ()


# The variables limit, from the top: our kernels; oneDNN; PyTorch's own kernels, which torch.compile asks as well; MKL,
# which computes float32's products.
TABLE = {
    entry.name: entry
    for entry in (
        InstructionSet("amx"),
        InstructionSet(
            "avx512_bf16",
            environment={
                "RIFORMER_CPU_ISA": "avx512_bf16",
                "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
                "ATEN_CPU_CAPABILITY": "avx512",
            },
            march="x86-64-v4",
            dtypes=("float32", "bfloat16"),
        ),
        # Servers from Skylake to Ice Lake. Their bfloat16 is computed in float32, ours and oneDNN's alike.
        InstructionSet(
            "avx512",
            environment={
                "RIFORMER_CPU_ISA": "avx512",
                "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
                "ATEN_CPU_CAPABILITY": "avx512",
            },
            march="x86-64-v4",
            dtypes=("float32", "bfloat16"),
        ),
        InstructionSet(
            "avx2",
            environment={
                "RIFORMER_CPU_ISA": "avx2",
                "ONEDNN_MAX_CPU_ISA": "AVX2",
                "ATEN_CPU_CAPABILITY": "avx2",
                "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            },
            march="x86-64-v3",
            dtypes=("float32",),
        ),
        InstructionSet("amx-emulated", hardware=False),
        # The float kernels of avx512 and avx2 once more, beside int8 ones: no dtype that is compared differs.
        InstructionSet("avx512_vnni", hardware=False),
        InstructionSet("avx2_vnni", hardware=False),
        # No limits, since neither oneDNN nor PyTorch has a variable for these. Nothing has been measured on Arm yet.
        InstructionSet("neon_bf16", architecture="aarch64"),
        InstructionSet("neon", architecture="aarch64"),
        InstructionSet("scalar", architecture="any", hardware=False),
    )
}
"""Every instruction set that the library is compiled for on some architecture, the best of each first."""

HARDWARE = tuple(name for name, entry in TABLE.items() if entry.hardware)
LIMITS = tuple(name for name, entry in TABLE.items() if entry.environment)

_CONVOLUTIONS_ONLY = "only its convolutions obey ONEDNN_MAX_CPU_ISA, the rest stays on the best instruction set"
UNLIMITED = {
    # Under ONEDNN_MAX_CPU_ISA=AVX2 its runtime graph keeps jit_avx512_f32 and gemm_mlas_f32 beside brgconv_avx2_f32.
    "openvino_latency": _CONVOLUTIONS_ONLY,
    "openvino_throughput": _CONVOLUTIONS_ONLY,
    "onnxruntime": "it has no switch for the instruction set",
}
"""Peers that cannot be limited, and why."""


def best() -> str | None:
    """The best instruction set of this processor that the library has, whatever is chosen; None without one."""
    supported = cpu.isa_status()["supported"]
    return next((name for name in HARDWARE if name in supported), None)


def up_to(name: str | None) -> tuple[str, ...]:
    """``name`` and the instruction sets below it that the same processors have; none for None and for what is not of a
    processor."""
    if name not in HARDWARE:
        return ()
    return tuple(
        other for other in HARDWARE[HARDWARE.index(name) :] if TABLE[other].architecture == TABLE[name].architecture
    )


def below() -> list[str]:
    """The limits that take something away on this machine."""
    return [name for name in up_to(best())[1:] if name in LIMITS]


def check(name: str | None = None) -> None:
    """Raises BackendError when ``name``, or what ``RIFORMER_CPU_ISA`` forces, is not to be had; it names what is."""
    status = cpu.isa_status()
    if status["error"]:
        raise BackendError(str(cpu.unusable()))
    if name is not None and name not in status["supported"]:
        expected = ", ".join(status["supported"])
        raise BackendError(f"instruction set {name!r} is not to be had on this machine; expected one of {expected}")


def environment(limit: str | None) -> dict[str, str]:
    """Variables for a worker that is limited to ``limit``; none without a limit."""
    return {} if limit is None else dict(TABLE[limit].environment)


def limit_inductor(limit: str | None) -> None:
    """Limit torch.compile in this process where the environment does not reach.

    Under ATEN_CPU_CAPABILITY=avx512 it takes AMX all the same. And whatever vectors it writes out, it has them compiled
    for the machine that it runs on.
    """
    if limit is None:
        return
    from torch._inductor import config, cpu_vec_isa

    cpu_vec_isa.VecAMX.__bool__ = lambda self: False
    config.cpp.march = TABLE[limit].march
