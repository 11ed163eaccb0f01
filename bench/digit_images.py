"""The scanned digits that the demo classifies, as images for the comparison in int8: real, and of any size.

A quantisation that is calibrated on one kind of image may only be judged on the same kind. So those that calibrate
come from the training part of the digits, and those that judge from the held-out part.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import riformer
import torch
import torch.nn.functional as F
from child import HERE
from torch import Tensor

EXAMPLES = HERE.parent / "examples"
CHECKPOINT = EXAMPLES / "digits" / "riformer_digits.safetensors"
CALIBRATION = 300
"""Images that calibrate. NNCF takes 300 unless it is told otherwise, and its manual names that number."""


@functools.cache
def _parts() -> tuple[Tensor, Tensor, Tensor]:
    """Images for calibration, held-out images, and the labels of these.

    Raises:
        ImportError: the digits are not there; the text says how to install them.
    """
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    import _digits

    try:
        training, held_out = _digits.split(_digits.load())
    except _digits.DataError as error:
        raise ImportError(str(error)) from None
    # In the order of the file all images of a class come together: those that calibrate are of all classes.
    mixed = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    return _digits.to_input(training.images[mixed]), _digits.to_input(held_out.images), held_out.labels


def available() -> str | None:
    """Why the digits are not there, or None."""
    try:
        _parts()
    except ImportError as error:
        return str(error)
    return None


def _shaped(images: Tensor, size: int, channels: int) -> Tensor:
    """[n, channels, size, size], every channel the same."""
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images.expand(-1, channels, -1, -1).contiguous()


def calibration(batch: int, size: int, channels: int = 3) -> list[Tensor]:
    """Batches of at least ``CALIBRATION`` images together."""
    count = -(-CALIBRATION // batch) * batch
    images = _parts()[0]
    count = min(count, len(images) // batch * batch)
    return [part.contiguous() for part in _shaped(images[:count], size, channels).split(batch)]


def held_out(count: int, size: int, channels: int = 3) -> Tensor:
    """So many images that calibrated nothing; of all classes, from the front again where there are not enough."""
    images = _parts()[1]
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    return _shaped(images[mixed[torch.arange(count) % len(images)]], size, channels)


def labelled() -> tuple[Tensor, Tensor]:
    """All held-out images as the demo's network takes them, and their labels."""
    return _parts()[1:]


def classifier(path: Path = CHECKPOINT) -> riformer.RIFormer:
    """The demo's network, deployed, in evaluation mode."""
    weights = riformer.load_checkpoint(path)
    model = riformer.infer_arch(weights).build()
    riformer.load_into(model, weights)
    return model.eval().switch_to_deploy()
