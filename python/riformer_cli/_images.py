"""Images for ``predict``: find them, read them, bring them into the form that the network was trained on."""

from __future__ import annotations

import glob
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._output import CliError

if TYPE_CHECKING:
    import numpy as np

IMAGENET = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}
CROP_PCT = 0.95
# What mmpretrain evaluates the published checkpoints with: shorter side by family and image size.
_PUBLISHED_RESIZE = {("s", 224): 248, ("m", 224): 236, ("s", 384): 426, ("m", 384): 404}
# Files of a folder that count as images. (Pillow's own list has videos and data containers in it.)
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .gif .webp .avif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .tga".split()
)


class Unreadable(Exception):
    """This image cannot be used; the message says why."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side to ``resize`` (bicubic), crop ``image_size`` from the centre, (x / 255 - mean) / std."""

    channels: int
    image_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def preprocessing(
    channels: int,
    arch: str | None,
    metadata: dict[str, str],
    published_size: int | None = None,
    *,
    image_size: int | None = None,
    crop_pct: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocessing:
    """Options first, then the checkpoint's metadata (``image_size``, ``crop_pct``, ``mean``, ``std``), then defaults.

    Raises:
        CliError: values that do not fit together.
    """
    if channels not in IMAGENET:
        raise CliError(
            f"the checkpoint takes images of {channels} channels; predict reads greyscale (1) and colour (3) only"
        )
    stored_size = None if image_size else _from_metadata(metadata, "image_size", 1)
    size = image_size or (int(stored_size[0]) if stored_size else published_size or 224)
    if size < 3:
        raise CliError(f"image size {size}: expected at least 3, the stem's window")
    crop = crop_pct or (_from_metadata(metadata, "crop_pct", 1) or (None,))[0]
    if crop is not None and not 0 < crop <= 1:
        raise CliError(f"crop_pct {crop:g}: expected more than 0 and at most 1")
    resize = None if crop else _PUBLISHED_RESIZE.get(((arch or " ")[0], size))
    resize = resize or max(size, round(size / (crop or CROP_PCT)))
    values = []
    for name, given, default in zip(("mean", "std"), (mean, std), IMAGENET[channels], strict=True):
        found = tuple(given) if given else _from_metadata(metadata, name, channels) or default
        if len(found) != channels:
            raise CliError(f"--{name} has {len(found)} values, the checkpoint takes images of {channels} channels")
        values.append(found)
    if not all(0 < value < math.inf for value in values[1]) or not all(map(math.isfinite, values[0])):
        raise CliError(f"mean must be finite and std positive; found mean {list(values[0])}, std {list(values[1])}")
    return Preprocessing(channels, size, resize, *values)


def _from_metadata(metadata: dict[str, str], key: str, count: int) -> tuple[float, ...] | None:
    """``count`` numbers of the checkpoint's metadata (JSON: a number or a list), None if it has none."""
    if key not in metadata:
        return None
    try:
        found = json.loads(metadata[key])
        numbers = tuple(float(value) for value in (found if isinstance(found, list) else [found]))
    except (ValueError, TypeError):
        numbers = ()
    if len(numbers) != count or not all(math.isfinite(value) for value in numbers):
        raise CliError(
            f"the checkpoint's metadata says {key} = {metadata[key]!r}; expected {count} "
            f"{'number' if count == 1 else 'numbers in a list'}. --{key.replace('_', '-')} overrides it"
        )
    return numbers


# ------------------------------------------------------------------------------------------------------------ finding


def require_pillow() -> None:
    """Raise a CliError that says how to get Pillow if it is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise CliError(
            f"predict reads images with Pillow, which cannot be imported ({error}); "
            "pip install 'riformer-kernels[cli]', or pip install pillow"
        ) from error


def expand(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Files for the command line's arguments, in its order, and (argument, reason) for those that name none.

    A folder stands for the images in it and below, sorted, hidden ones left out; a pattern that the shell did not
    expand for what matches it. An existing file is itself, whatever its name.
    """
    files: list[str] = []
    failed: list[tuple[str, str]] = []
    for argument in arguments:
        if os.path.isdir(argument):
            found = _images_below(argument)
            reason = "there are no images in this folder"
        elif os.path.lexists(argument) or not glob.has_magic(argument):
            found, reason = [argument], ""
        else:
            matches = sorted(glob.glob(argument, recursive=True))
            found = [file for match in matches for file in (_images_below(match) if os.path.isdir(match) else [match])]
            reason = "nothing matches this pattern"
        files += found
        if not found:
            failed.append((argument, reason))
    return files, failed


def _images_below(folder: str) -> list[str]:
    found = []
    for path in Path(folder).rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            found.append(str(path))
    return sorted(found)


# ------------------------------------------------------------------------------------------------------------ reading


def load(path: str, how: Preprocessing) -> np.ndarray:
    """One image as float32 [channels, image_size, image_size], normalised.

    Raises:
        Unreadable: whatever is wrong with this file.
    """
    import numpy as np

    try:
        image = _open(path, how)
    except Unreadable:
        raise
    except OSError as error:
        raise Unreadable(_reason(error)) from error
    # Damaged files surface as almost anything: SyntaxError, ValueError, struct.error, DecompressionBombError, ...
    except Exception as error:
        raise Unreadable(f"damaged, or not an image that Pillow can read ({_reason(error)})") from error
    pixels = np.asarray(image, dtype=np.float32).reshape(how.image_size, how.image_size, how.channels)
    mean, std = (np.asarray(values, dtype=np.float32) for values in (how.mean, how.std))
    return np.ascontiguousarray(((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1))


def _open(path: str, how: Preprocessing) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise Unreadable("empty file (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; what matters is raised
        try:
            with Image.open(path) as opened:
                opened.load()
                image = ImageOps.exif_transpose(opened)
        except UnidentifiedImageError:
            raise Unreadable("not an image that Pillow can read") from None
        image = _eight_bits(image).convert("RGB" if how.channels == 3 else "L")
    width, height = image.size
    scale = how.resize / min(width, height)
    size = tuple(
        how.resize if side == min(image.size) else max(how.image_size, int(side * scale)) for side in image.size
    )
    if max(size) > 64 * how.resize:
        raise Unreadable(f"{width} x {height} pixels: too long and thin to crop a square from")
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - how.image_size) // 2 for side in size)
    return image.crop((left, top, left + how.image_size, top + how.image_size))


def _eight_bits(image: Any) -> Any:
    """16-bit greyscale scaled to 8 bits, where Pillow's own conversion would clip it to white."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32) / np.float32(257)
        return Image.fromarray(np.rint(values).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Unreadable(f"pixels of mode {image.mode} have no known range; convert it to 8 bits first")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
