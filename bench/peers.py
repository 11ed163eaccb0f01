"""The registry of peers: other ways to run the same model, each with its availability; their errors and memory.

A peer is a factory in ``FACTORIES``; a new one is one more function. A factory gets the ``Subject`` and returns a
``Peer``; what it raises becomes the peer's reason. The patched model is built the same way, under the name "ours".
Peers run under ``torch.inference_mode`` on an input that is already in their dtype and layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import digit_images
import isa
import peers_int8
import peers_runtime
import peers_torch
import torch
from peers_torch import OURS
from subject import NCHW, REWRITTEN, UNCHANGED, Peer, Subject, random_images, random_model
from torch import Tensor
from worker import describe

from riformer_kernels import numerics

FACTORIES: dict[str, tuple[str, Callable[[Subject], Peer]]] = {
    OURS: (UNCHANGED, peers_torch.ours),
    "eager": (UNCHANGED, peers_torch.eager),
    "eager_channels_last": (UNCHANGED, peers_torch.eager_channels_last),
    "eager_linear": (REWRITTEN, peers_torch.eager_linear),
    "compile": (UNCHANGED, peers_torch.compile_),
    "compile_linear": (REWRITTEN, peers_torch.compile_linear),
    "openvino_latency": (UNCHANGED, peers_runtime.openvino_latency),
    "openvino_throughput": (UNCHANGED, peers_runtime.openvino_throughput),
    "onnxruntime": (UNCHANGED, peers_runtime.onnxruntime),
}
COMPILED = ("compile", "compile_linear", "torchao_dynamic", "torchao_static")


def factories(int8: bool) -> dict[str, tuple[str, Callable[[Subject], Peer]]]:
    """The peers in floating point, or those in int8."""
    return peers_int8.FACTORIES if int8 else FACTORIES


def names(compiled: bool = True, rewritten: bool = True, int8: bool = False) -> list[str]:
    """All of them, or without those that compile for minutes, or those that need a rewritten model; ours first."""
    return [
        name
        for name, (form, _) in factories(int8).items()
        if (compiled or name not in COMPILED) and (rewritten or form == UNCHANGED)
    ]


def build(name: str, subject: Subject) -> Peer:
    """The peer, called once on the subject's batch; one that fails has a reason in place of ``run``.

    Only ours may raise: a failure of the thing measured is no measurement.
    """
    form, factory = factories(subject.int8)[name]
    try:
        peer = factory(subject)
        with torch.inference_mode():
            peer.on(subject.x)()
    except Exception as error:
        if name == OURS:
            raise
        return Peer(name, form, None, NCHW, "", describe(error))
    return peer


# ---------------------------------------------------------------------------------------------------------- workers

SUBJECT, INPUTS = "subject.pt", "inputs.pt"


def serve(folder: str, name: str, limit: str | None = None) -> tuple[Callable[[], object], dict[str, Any]]:
    """A worker's target: the peer ``name`` on the subject in ``folder``. Its logits, for the judge, go there as well.

    Raises whatever keeps the peer from running.
    """
    isa.limit_inductor(limit)
    subject = Subject.load(Path(folder) / SUBJECT)
    peer = factories(subject.int8)[name][1](subject)
    assert peer.run is not None
    inputs = torch.load(Path(folder) / INPUTS, weights_only=True)
    torch.save(outputs(peer.run, inputs, peer.layout, _judged(subject)), Path(folder) / f"{name}.pt")
    call = peer.on(subject.x)
    call()
    return call, {"detail": peer.detail, "batches": peer.batches}


def serve_ours(arch: Any, size: int, batch: int, dtype: str) -> tuple[Callable[[], object], dict[str, Any]]:
    """A worker's target: the patched model alone, with parameters and images of its own."""
    kind = getattr(torch, dtype)
    peer = peers_torch.ours(Subject(random_model(arch, kind), random_images(batch, size, kind)))
    return peer.on(random_images(batch, size, kind)), {"detail": peer.detail}


# ----------------------------------------------------------------------------------------------------------- errors

CHECKED, CHECKED_INT8 = 4, 16
"""Images. In int8 single images scatter more, as each has its own largest values."""


@torch.inference_mode()
def outputs(
    run: Callable[[Tensor], Any], inputs: Sequence[Tensor], layout: torch.memory_format = NCHW, count: int = CHECKED
) -> Tensor:
    """Logits, or features where ``run`` returns a tuple of them, of the first ``count`` images of several batches."""
    found = [run(x.contiguous(memory_format=layout)) for x in inputs]
    return torch.cat([(part[-1] if isinstance(part, tuple) else part).clone() for part in found])[:count]


def judged_inputs(subject: Subject) -> list[Tensor]:
    """Batches of the subject's size, of at least as many images as are judged; digits in int8."""
    batch, channels, _, size = subject.x.shape
    images = -(-_judged(subject) // batch) * batch
    if subject.int8:
        x = digit_images.held_out(images, size, channels).bfloat16().float()
    else:
        x = random_images(images, size, subject.x.dtype, seed=2)
    return [part.clone() for part in x.split(batch)]


def _judged(subject: Subject) -> int:
    return CHECKED_INT8 if subject.int8 else CHECKED


class Judge:
    """Error figures of every peer on the same images, against float64 and eager PyTorch (the error-ratio rule).

    At least ``CHECKED`` images: those of one alone scatter. A peer with a fixed batch is called on several batches. In
    int8 the images are digits that calibrated nothing, and eager PyTorch computes in bfloat16.

    Attributes:
        inputs: batches of the subject's size.
        count: of the images that are judged.
    """

    def __init__(self, subject: Subject) -> None:
        self.count = _judged(subject)
        self.inputs = judged_inputs(subject)
        self._int8 = subject.int8
        eager = copy.deepcopy(subject.model).bfloat16() if subject.int8 else subject.model
        inputs = [part.bfloat16() for part in self.inputs] if subject.int8 else self.inputs
        golden = copy.deepcopy(subject.model).double()
        self.golden = outputs(golden, [torch.cat(self.inputs)[: self.count].double()], count=self.count)
        self.eager = outputs(eager, inputs, count=self.count)

    def ratios(self, name: str, found: Tensor) -> numerics.ErrorRatios:
        """Of what `outputs` returned for the peer; raises AssertionError when ours breaks the rule, else reports it.

        The rule's limits are those of floating point. In int8 `patch` itself verifies ours, by its limits for that.
        """
        ratios = numerics.compare(found, self.eager, self.golden, self.eager.dtype)
        ours = name == OURS and not self._int8
        assert ratios.passed or not ours, f"the patched model is not accurate enough: {ratios.exceeded}"
        return ratios


# ----------------------------------------------------------------------------------------------------------- memory


def memory_subject(arch: Any, size: int, dtype: str, name: str) -> Callable[[int], Callable[[], object]]:
    """What `memory.peak_memory` runs in its own process: ``prepare(batch)`` for the peer ``name``."""
    kind = getattr(torch, dtype)
    peer = FACTORIES[name][1](Subject(random_model(arch, kind), random_images(1, size, kind)))
    return lambda batch: peer.on(random_images(batch, size, kind))


MEASURED = (OURS, "eager", "eager_channels_last")
"""Peers whose memory is measured. torch.compile's first call at a batch compiles, which is not what a call needs."""
