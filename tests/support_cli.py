"""Models, images and the environment of processes that the tests of the command line share."""

from __future__ import annotations

import io
import os

import numpy as np
import riformer
import torch
from support_models import TINY
from support_paths import ROOT

COMMANDS = ("info", "verify", "predict", "convert", "bench")
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
EXACT = ["--image-size", "32", "--crop-pct", "1"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tiny(seed: int = 0, **options: object) -> torch.nn.Module:
    return riformer.randomize_(riformer.RIFormer(TINY, **{"num_classes": 10, **options}), seed).eval()


def pixels(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    return {**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "PYTHONPATH": path, **more}


def softmax(model: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    """Plain PyTorch on [B, H, W, C] bytes, with ImageNet's mean and std."""
    x = (torch.tensor(images).double() / 255 - torch.from_numpy(MEAN)) / torch.from_numpy(STD)
    with torch.inference_mode():
        return model(x.permute(0, 3, 1, 2).float().contiguous()).softmax(-1)


def probabilities(image: dict) -> list[float]:
    return [entry["probability"] for entry in sorted(image["predictions"], key=lambda entry: entry["class"])]
