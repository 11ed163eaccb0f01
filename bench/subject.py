"""The subject: a deployed classifier with hard random parameters, and a batch for it. A peer: a way to run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import riformer
import torch
from torch import Tensor

NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = {"NCHW": NCHW, "channels_last": CHANNELS_LAST}
UNCHANGED, REWRITTEN = "unchanged", "rewritten"


def random_model(arch: riformer.arch.ArchLike, dtype: torch.dtype = torch.float32, seed: int = 0) -> riformer.RIFormer:
    """A deployed classifier with hard random parameters, rounded to ``dtype``, in evaluation mode."""
    model = riformer.RIFormer(arch, num_classes=1000, deploy=True)
    return riformer.randomize_(model, seed).to(dtype).eval()


def random_images(
    batch: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0, channels: int = 3
) -> Tensor:
    """[batch, channels, size, size], NCHW."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, channels, size, size), generator=generator).to(dtype)


@dataclass(frozen=True)
class Subject:
    """A deployed classifier in evaluation mode in the tested dtype, and an NCHW batch for it.

    With ``int8`` both are float32, of values that bfloat16 holds exactly, and every peer quantises for itself.
    """

    model: riformer.RIFormer
    x: Tensor
    int8: bool = False

    def save(self, path: Path, arch: Any) -> None:
        """For a worker: random numbers of the same seed differ in the last bit between instruction sets."""
        dtype = str(self.x.dtype).removeprefix("torch.")
        state = self.model.state_dict()
        torch.save({"arch": arch, "dtype": dtype, "state": state, "x": self.x, "int8": self.int8}, path)

    @staticmethod
    def load(path: Path) -> Subject:
        found = torch.load(path, weights_only=True)
        model = riformer.RIFormer(found["arch"], num_classes=1000, deploy=True).to(getattr(torch, found["dtype"]))
        model.load_state_dict(found["state"])
        return Subject(model.eval(), found["x"], found["int8"])


@dataclass(frozen=True)
class Peer:
    """One way to run the subject.

    Attributes:
        name: as in the results.
        form: "unchanged" for the model as users have it, "rewritten" for one that a user would first rewrite by hand.
        run: images (in ``layout``) to logits; None when there is none.
        layout: memory format that ``run`` wants.
        detail: what exactly this is.
        reason: why there is no ``run``, else None.
        prepare: images to the call to be timed, where that is not ``run`` on them.
        batches: that one such call takes.
    """

    name: str
    form: str
    run: Callable[[Tensor], Tensor] | None
    layout: torch.memory_format
    detail: str
    reason: str | None = None
    prepare: Callable[[Tensor], Callable[[], object]] | None = None
    batches: int = 1

    def on(self, x: Tensor) -> Callable[[], object]:
        """A call on ``x``, which is laid out here, once."""
        assert self.run is not None, self.reason
        if self.prepare is not None:
            return self.prepare(x)
        run, laid_out = self.run, x.contiguous(memory_format=self.layout)
        return lambda: run(laid_out)
