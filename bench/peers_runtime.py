"""The peers that are other runtimes, on the unchanged model: OpenVINO with both of its hints, and ONNX Runtime.

Each gets as many threads as PyTorch has here, and images that are already in memory. Neither takes a bfloat16 NumPy
array. OpenVINO's users give it a float32 model and say in which precision it should compute. So it gets the model's
values and the images in float32, which is exact, and returns float32.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from subject import NCHW, UNCHANGED, Peer, Subject
from torch import Tensor

EXTRA = "pip install 'riformer-kernels[peers]'"
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
ROUNDS = 2
"""Batches per request in one timed call: the fewest with which a request that is done early has more to do."""


def need(*modules: str) -> list[Any]:
    """The modules. One that is not installed is an ImportError that says how to install it."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed ({EXTRA})") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block the tracer and the exporter make no remarks about shape checks in the model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def openvino_latency(subject: Subject) -> Peer:
    return _openvino(subject, "LATENCY")


def openvino_throughput(subject: Subject) -> Peer:
    return _openvino(subject, "THROUGHPUT")


def _openvino(subject: Subject, hint: str) -> Peer:
    """OpenVINO with a performance hint, in the subject's precision."""
    need("openvino")
    return openvino_peer(convert(subject), subject, hint, PRECISIONS[subject.x.dtype])


def convert(subject: Subject) -> Any:
    """The subject's model as OpenVINO has it, with float32 values and the subject's shape."""
    (openvino,) = need("openvino")
    x = subject.x.float()
    with quiet(), torch.inference_mode():
        return openvino.convert_model(copy.deepcopy(subject.model).float(), example_input=x, input=[tuple(x.shape)])


def openvino_peer(converted: Any, subject: Subject, hint: str, precision: str | None, what: str = "") -> Peer:
    """A converted model with a performance hint.

    For latency a call is one synchronous request. The throughput hint makes several streams of few threads, and one
    synchronous request would use only one of them. So a call is ``ROUNDS`` batches for each of as many requests as
    OpenVINO calls optimal, all in flight together, and its time is divided by the number of batches. That is the time
    between two results, not that of one. It is compared with the time of one batch of the others, which favours
    OpenVINO.

    Args:
        precision: what it has to compute in; None leaves it the choice.
        what: for the detail, in place of the precision.
    """
    (openvino,) = need("openvino")
    settings = {
        "PERFORMANCE_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Pinning would change the affinity of the whole process: with other pools in it, it slowed PyTorch 1.5 times.
        "ENABLE_CPU_PINNING": False,
    }
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if precision not in (None, chosen):
        raise ValueError(f"asked for {precision}, OpenVINO computes in {chosen} on this processor")
    streams = compiled.get_property("NUM_STREAMS")
    requests = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") if hint == "THROUGHPUT" else 1

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled([images.float().numpy()])[0].copy())

    def prepare(images: Tensor) -> Callable[[], object]:
        array = images.float().numpy()
        if hint == "LATENCY":
            request = compiled.create_infer_request()
            tensor = openvino.Tensor(array, shared_memory=True)
            request.set_input_tensor(tensor)

            # The request does not hold the array: freed under it, batch 16 in float32 ended in a segmentation fault.
            def infer(held: tuple[object, ...] = (array, tensor)) -> None:
                request.infer()

            return infer
        queue = openvino.AsyncInferQueue(compiled, requests)

        def call() -> None:
            for _ in range(batches):
                queue.start_async([array], share_inputs=True)
            queue.wait_all()

        return call

    batches = ROUNDS * requests if hint == "THROUGHPUT" else 1
    detail = (
        f"OpenVINO {version(openvino)}, {hint.lower()} hint, {what or chosen}, {streams} stream{'s' * (streams != 1)}, "
        + (f"{requests} requests in flight, time per batch of {batches}" if hint == "THROUGHPUT" else "one request")
        + ", float32 in and out"
    )
    return Peer(f"openvino_{hint.lower()}", UNCHANGED, run, NCHW, detail, prepare=prepare, batches=batches)


def onnxruntime(subject: Subject) -> Peer:
    """ONNX Runtime's CPU provider, all graph optimisations, on what ``torch.onnx.export`` makes of the model."""
    if subject.x.dtype != torch.float32:
        raise ValueError("ONNX Runtime's CPU provider has float32 convolutions only")
    need("onnxruntime", "onnx", "onnxscript")
    with tempfile.TemporaryDirectory() as folder:
        return onnxruntime_peer(export_onnx(subject, Path(folder)))


def export_onnx(subject: Subject, folder: Path) -> Path:
    """The subject's model as ONNX, for its shape."""
    path = folder / "model.onnx"
    with quiet():
        torch.onnx.export(copy.deepcopy(subject.model), (subject.x,), dynamo=True, verbose=False).save(path)
    return path


def onnxruntime_peer(path: Path, what: str = "") -> Peer:
    """An ONNX file in ONNX Runtime; the file is not needed any longer."""
    (runtime,) = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    detail = f"ONNX Runtime {version(runtime)}, CPU provider, all optimisations"
    return Peer("onnxruntime", UNCHANGED, run, NCHW, f"{detail}, {what}" if what else detail)


def version(module: Any) -> str:
    return module.__version__.partition("-")[0]
