"""The peers that compute in int8, each quantised as its own documentation advises for such a network.

What the documentations say, and what was chosen among it: bench/notes/2026-11-21-int8-peers.md. All of them get the
float32 model and ``digit_images.calibration`` images. Images and logits are float32, as for users.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digit_images
import peers_runtime
import peers_torch
import torch
from peers_runtime import need, openvino_peer, quiet, version
from peers_torch import OURS, fastest
from subject import CHANNELS_LAST, REWRITTEN, UNCHANGED, Peer, Subject
from token_form import token_form
from torch import Tensor, nn

import riformer_kernels
from riformer_kernels import BackendError, PatchError, VerificationError
from riformer_kernels.machine import cpu_flags

OURS_BFLOAT16 = "ours_bfloat16"
"""This engine in bfloat16: what its int8 has to be faster than."""
QUANTISED_OPS = ("Conv", "Gemm")


def not_offered(model: nn.Module) -> str | None:
    """Why this version of the engine does not run ``model`` in int8, or None."""
    try:
        riformer_kernels.patch(copy.deepcopy(model), compute_dtype=torch.int8, verify=False)
    except VerificationError:
        return None
    except (PatchError, BackendError) as error:
        return f"not offered by this version: {' '.join(str(error).split())[:300]}"
    return None


def ours(subject: Subject) -> Peer:
    return peers_torch.ours(subject, torch.int8)


def ours_bfloat16(subject: Subject) -> Peer:
    return peers_torch.ours(subject, torch.bfloat16, name=OURS_BFLOAT16)


def _calibration(subject: Subject) -> list[Tensor]:
    batch, channels, _, size = subject.x.shape
    return digit_images.calibration(batch, size, channels)


# --------------------------------------------------------------------------------------------------------- runtimes


def openvino_latency(subject: Subject) -> Peer:
    return _openvino(subject, "LATENCY")


def openvino_throughput(subject: Subject) -> Peer:
    return _openvino(subject, "THROUGHPUT")


def _openvino(subject: Subject, hint: str) -> Peer:
    """NNCF's post-training quantisation. What stays in floating point, OpenVINO computes in the precision it prefers.

    Its manual recommends the preset MIXED where activations are no ReLU, such as GELU.
    """
    (_, nncf) = need("openvino", "nncf")
    images = [part.numpy() for part in _calibration(subject)]
    with quiet():
        quantised = nncf.quantize(
            peers_runtime.convert(subject),
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(images),
        )
    count = len(images) * len(images[0])
    return openvino_peer(quantised, subject, hint, None, f"int8 by NNCF {version(nncf)} (MIXED, {count} digits)")


def onnxruntime(subject: Subject) -> Peer:
    """Static quantisation in its recommended format, after the pre-processing that it recommends.

    Only the products are quantised. With all ops the quantiser of 1.31 fails on this network ("shared mode is not
    supported for weight yet"); with the additions, multiplications and GELUs as well it is a third as fast.
    """
    runtime, *_ = need("onnxruntime", "onnx", "onnxscript")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self._images = ({name: part.numpy()} for part in _calibration(subject))

        def get_next(self) -> dict[str, Any] | None:
            return next(self._images, None)

    # Without VNNI the sum of two products may not fit into its 16 bits; weights of 7 bits keep it from that.
    reduced = not has_vnni()
    with tempfile.TemporaryDirectory() as folder, quiet():
        exported = peers_runtime.export_onnx(subject, Path(folder))
        prepared, quantised = exported.with_name("prepared.onnx"), exported.with_name("quantised.onnx")
        quant_pre_process(exported, prepared)
        name = runtime.InferenceSession(prepared, providers=["CPUExecutionProvider"]).get_inputs()[0].name
        quantize_static(
            prepared,
            quantised,
            Reader(name),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED_OPS),
            per_channel=True,
            reduce_range=reduced,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        weights = "7-bit weights" if reduced else "weights s8"
        what = f"static QDQ of {' and '.join(QUANTISED_OPS)}, activations u8, {weights} per channel"
        return peers_runtime.onnxruntime_peer(quantised, what)


# ---------------------------------------------------------------------------------------------------------- torchao


def torchao_dynamic(subject: Subject) -> Peer:
    """int8 weights per channel and activations per token, whose scales are found in each call; linear layers only.

    torch.compile as for the floating-point peers. On a float32 and on a bfloat16 model, the faster one stays.
    """
    torchao, quantization = need("torchao", "torchao.quantization")

    def make(dtype: torch.dtype) -> Peer:
        model = token_form(subject.model).to(dtype).to(memory_format=CHANNELS_LAST)
        # Without VNNI as for ONNX Runtime.
        config = quantization.Int8DynamicActivationInt8WeightConfig(reduce_range=not has_vnni())
        quantization.quantize_(model, config)
        call = peers_torch.compiled(model, "channels_last", subject.x.to(dtype))
        detail = f"torchao {version(torchao)}, dynamic, torch.compile max-autotune, freezing"
        return Peer("torchao_dynamic", REWRITTEN, lambda x: call(x.to(dtype)).float(), CHANNELS_LAST, detail)

    with quiet():
        dtypes = {"float32 elsewhere": torch.float32, "bfloat16 elsewhere": torch.bfloat16}
        return fastest({label: functools.partial(make, dtype) for label, dtype in dtypes.items()}, subject.x)


def torchao_static(subject: Subject) -> Peer:
    """Export, observe, convert with the quantiser for x86, then torch.compile with freezing: its way for the CPU.

    It quantises convolutions as well, but is up to 1.9 times as fast on the rewritten model. With and without bfloat16
    for what stays in floating point; the faster one stays.
    """
    torchao, pt2e, x86 = need(
        "torchao", "torchao.quantization.pt2e.quantize_pt2e",
        "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer",
    )  # fmt: skip

    @functools.cache
    def converted() -> nn.Module:
        model = token_form(subject.model).to(memory_format=CHANNELS_LAST)
        x = subject.x.contiguous(memory_format=CHANNELS_LAST)
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=not has_vnni()))
        with torch.no_grad():
            prepared = pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
            for images in _calibration(subject):
                prepared(images.contiguous(memory_format=CHANNELS_LAST))
            return pt2e.convert_pt2e(prepared)

    def make(mixed: bool) -> Peer:
        torch.compiler.reset()
        made = torch.compile(converted())

        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                return made(x)

        x = subject.x.contiguous(memory_format=CHANNELS_LAST)
        with torch._inductor.config.patch(freezing=True), torch.no_grad():
            call(x)
        detail = f"torchao {version(torchao)}, static for x86, torch.compile, freezing"
        return Peer("torchao_static", REWRITTEN, lambda x: call(x).float(), CHANNELS_LAST, detail)

    with quiet():
        attempts = {"float32 elsewhere": False, "bfloat16 elsewhere": True}
        return fastest({label: functools.partial(make, mixed) for label, mixed in attempts.items()}, subject.x)


def has_vnni() -> bool:
    """Whether the processor has instructions that sum products of 8 bits in 32."""
    return bool({"avx512_vnni", "avx_vnni"} & set(cpu_flags()))


FACTORIES: dict[str, tuple[str, Callable[[Subject], Peer]]] = {
    OURS: (UNCHANGED, ours),
    OURS_BFLOAT16: (UNCHANGED, ours_bfloat16),
    "openvino_latency": (UNCHANGED, openvino_latency),
    "openvino_throughput": (UNCHANGED, openvino_throughput),
    "onnxruntime": (UNCHANGED, onnxruntime),
    "torchao_dynamic": (REWRITTEN, torchao_dynamic),
    "torchao_static": (REWRITTEN, torchao_static),
}
