"""How accurate int8 is, ours and that of each peer: features of a hard model, and the answers to the demo's digits.

Two networks, as neither says enough alone. With hard random parameters every defect shows, but nobody knows what the
logits of such a network are good for. The digits are a task, but too easy to tell good schemes from better ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import digit_images
import peers
import peers_int8
import riformer
import torch
from measure import Progress, error_columns, int8_subject
from peers_int8 import OURS
from subject import NCHW, Subject
from torch import Tensor
from worker import Worker, WorkerError

BATCH, DIGITS_BATCH = 16, 100
EAGER = "eager_bfloat16"
"""The yardstick has a row as well: what it answers to the digits."""
PARTS = ("features", "digits")


def backbone(model: riformer.RIFormer) -> riformer.RIFormer:
    """A classifier without its head: what users of features run."""
    found = riformer.RIFormer(model.arch, in_channels=model.in_channels, deploy=True)
    found.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("head.")})
    return found.eval()


def subjects(arch: Any, size: int) -> dict[str, Subject]:
    """What is quantised, by part. The digits' parameters and images are rounded to bfloat16 as the others' are."""
    hard = int8_subject(arch, size, BATCH)
    digits = digit_images.classifier().bfloat16().float()
    images = digit_images.labelled()[0][:DIGITS_BATCH].bfloat16().float()
    return {
        "features": Subject(backbone(hard.model), hard.x, int8=True),
        "digits": Subject(digits, images, int8=True),
    }


def inputs(subject: Subject, part: str) -> list[Tensor]:
    """The batches of a part that are judged."""
    if part == "features":
        return peers.judged_inputs(subject)
    return list(digit_images.labelled()[0].bfloat16().float().split(DIGITS_BATCH))


def serve(folder: str, name: str, arch: Any, size: int) -> tuple[Callable[[], object], dict[str, Any]]:
    """A worker's target: what the peer ``name`` computes for each part goes to the folder; there is nothing to time."""
    details = []
    for part, subject in subjects(arch, size).items():
        peer = peers.factories(int8=True)[name][1](subject)
        batches = inputs(subject, part)
        count = sum(map(len, batches))
        torch.save(peers.outputs(peer.run, batches, peer.layout, count), Path(folder) / f"{name}.{part}.pt")
        details.append(peer.detail)
    return lambda: None, {"detail": details[PARTS.index("features")]}


def rows(arch: Any, size: int, names: Sequence[str], progress: Progress = lambda text: None) -> list[dict[str, Any]]:
    """A row for each peer, and one for eager bfloat16. Errors are those of features, against float64.

    Raises:
        ImportError: the digits are not there.
        WorkerError: ours is offered and fails.
    """
    progress("float64 and eager for the error figures")
    made = subjects(arch, size)
    judge = peers.Judge(made["features"])
    labels = digit_images.labelled()[1]
    batches = inputs(made["digits"], "digits")
    golden = peers.outputs(made["digits"].model.double(), [part.double() for part in batches], count=len(labels))
    common = {"kind": "int8_accuracy", "arch": arch if isinstance(arch, str) else "custom", "size": size}
    common |= {"digits": len(labels), "threads": torch.get_num_threads()}
    eager = peers.outputs(
        digit_images.classifier().bfloat16(), [part.bfloat16() for part in batches], NCHW, len(labels)
    )
    found = [
        {
            **common, "peer": EAGER, "detail": "the yardstick", "reason": None,
            **error_columns(judge.ratios(EAGER, judge.eager)), **digit_columns(eager, golden, labels),
        }
    ]  # fmt: skip
    for name in names:
        progress(f"quantising for {name}")
        outcome: Mapping[str, Any] = {
            "reason": peers_int8.not_offered(made["features"].model) if name == OURS else None
        }
        if outcome["reason"] is None:
            outcome = _outcome(name, arch, size)
        ratios = None if outcome["reason"] else judge.ratios(name, outcome["features"])
        found.append({
            **common, "peer": name, "detail": outcome.get("detail"), "reason": outcome["reason"],
            **error_columns(ratios), **digit_columns(outcome.get("digits"), golden, labels),
        })  # fmt: skip
    return found


def _outcome(name: str, arch: Any, size: int) -> dict[str, Any]:
    """What a peer computes, or the reason why it does not."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"folder": folder, "name": name, "arch": arch, "size": size}
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        try:
            worker = Worker(
                name, "int8_accuracy:serve", arguments, threads=torch.get_num_threads(), environment=environment
            )
        except WorkerError as error:
            if name == OURS:
                raise
            return {"reason": str(error)}
        with worker:
            parts = {part: torch.load(Path(folder) / f"{name}.{part}.pt", weights_only=True) for part in PARTS}
            return {"reason": None, "detail": worker.facts["detail"], **parts}


def digit_columns(logits: Tensor | None, golden: Tensor, labels: Tensor) -> dict[str, Any]:
    """The share of digits with the answer that float64 gives, and with the right one."""
    if logits is None:
        return {"digits_agreement": None, "digits_accuracy": None}
    answers = logits.argmax(1)
    return {
        "digits_agreement": (answers == golden.argmax(1)).double().mean().item(),
        "digits_accuracy": (answers == labels).double().mean().item(),
    }
