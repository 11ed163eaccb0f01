"""The photographs that the demo runs S12 on: scikit-learn's two sample images, cut to 224 x 224 as ImageNet's are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _digits import INSTALL, DataError
from torch import Tensor

NAMES = ("china.jpg", "flower.jpg")
SHORT_SIDE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def load() -> list[Tensor]:
    """The photographs as float32 ``[3, H, W]``, 0 to 1.

    Raises:
        DataError: scikit-learn or Pillow is not installed.
    """
    try:
        from sklearn.datasets import load_sample_image

        # A copy: the decoded image is read-only.
        images = [torch.tensor(load_sample_image(name)) for name in NAMES]
    except ImportError as error:
        raise DataError(
            f"the photographs come with scikit-learn and are read with Pillow; {error.name or error} is not "
            f"installed: {INSTALL}"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read scikit-learn's sample images: {error}. Install it anew: {INSTALL}") from error
    return [image.permute(2, 0, 1).float() / 255 for image in images]


def batch(photos: list[Tensor], size: int) -> Tensor:
    """``[size, 3, 224, 224]``, normalised: crops from left to right of each photograph, then the same mirrored.

    The first is from the first photograph. ``size`` is 1 or a multiple of 4.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    crops: list[Tensor] = []
    positions = max(1, size // (2 * len(photos)))
    for photo in photos:
        scale = SHORT_SIDE / min(photo.shape[1:])
        height, width = (round(side * scale) for side in photo.shape[1:])
        small = F.interpolate(photo[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
        small = (small.clamp(0, 1) - mean) / std
        top, free = (height - CROP) // 2, width - CROP
        lefts = [free // 2] if positions == 1 else [round(free * i / (positions - 1)) for i in range(positions)]
        crops += [small[:, top : top + CROP, left : left + CROP] for left in lefts]
    crops += [crop.flip(2) for crop in crops]
    return torch.stack(crops)[:size].contiguous()
