"""Keeping an instruction set from a peer: what a worker's environment has to say, and whom it cannot reach."""

from __future__ import annotations

from riformer_kernels.backends import cpu
from riformer_kernels.errors import BackendError

LIMITS: dict[str, dict[str, str]] = {
    "avx512": {
        "RIFORMER_CPU_ISA": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "ATEN_CPU_CAPABILITY": "avx512",
    },
    "avx2": {
        "RIFORMER_CPU_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
"""By limit: ours; oneDNN; PyTorch's own kernels, which torch.compile asks too; MKL, which is float32's product."""

UNREACHED = {
    # Under ONEDNN_MAX_CPU_ISA=AVX2 its runtime graph keeps jit_avx512_f32 and gemm_mlas_f32 beside brgconv_avx2_f32.
    "openvino_latency": "only its convolutions obey ONEDNN_MAX_CPU_ISA, the rest stays on the best instruction set",
    "openvino_throughput": "only its convolutions obey ONEDNN_MAX_CPU_ISA, the rest stays on the best instruction set",
    "onnxruntime": "it has no switch for the instruction set",
}
"""Peers that cannot be limited, and why."""


def best() -> str | None:
    """The best instruction set with vectors that this machine has, whatever is chosen; None without one."""
    return next((name for name in ("amx", "avx512", "avx2") if name in cpu.isa_status()["supported"]), None)


def below() -> list[str]:
    """The limits that take something away here."""
    order = ["amx", *LIMITS]
    return order[order.index(best()) + 1 :] if best() else []


def check(name: str | None = None) -> None:
    """Raises BackendError when ``name``, or what ``RIFORMER_CPU_ISA`` forces, is not to be had; it names what is."""
    status = cpu.isa_status()
    if status["error"]:
        raise BackendError(str(cpu.unusable()))
    if name is not None and name not in status["supported"]:
        raise BackendError(
            f"instruction set {name!r} is not to be had on this machine; expected one of {', '.join(status['supported'])}"
        )


def environment(limit: str | None) -> dict[str, str]:
    """Variables for a worker that is limited to ``limit``; none without a limit."""
    return {} if limit is None else LIMITS[limit]


def limit_inductor(limit: str | None) -> None:
    """What the environment does not reach in torch.compile, in this process: under ATEN_CPU_CAPABILITY=avx512 it takes
    AMX all the same, and it compiles for the machine that it runs on, whatever vectors it writes out."""
    if limit is None:
        return
    from torch._inductor import config, cpu_vec_isa

    cpu_vec_isa.VecAMX.__bool__ = lambda self: False
    config.cpp.march = {"avx2": "x86-64-v3", "avx512": "x86-64-v4"}[limit]
