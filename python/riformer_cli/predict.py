"""``riformer-kernels predict``: classify images."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _images
from ._arguments import COMPUTE, EXIT_CODES, add_backend, add_format, add_norm, dtype, integer, number
from ._models import (
    Source,
    arch_name,
    check_arch,
    compute_dtype,
    is_published,
    published_names,
    read,
    served_by,
    torch_dtype,
)
from ._output import CliError, document, note, printable, progress, table

if TYPE_CHECKING:
    from torch import nn

SUMMARY = "classify images with a checkpoint"
DESCRIPTION = """\
Classify images with the weights of a checkpoint, through the fused kernels.

IMAGE is a file, a folder (the images in it and below, told by their suffix) or a pattern. An image
that cannot be read is named on stderr with the reason, the others are still classified, and the exit
code is 1.

Preprocessing: EXIF rotation applied; colour, or greyscale for a checkpoint of one input channel
(16-bit greyscale scaled to 8, transparency dropped); shorter side resized to image size / crop-pct
(bicubic); centre crop; x / 255; minus mean, divided by std. Defaults: 224 pixels, crop-pct 0.95,
ImageNet's mean 0.485,0.456,0.406 and std 0.229,0.224,0.225 (greyscale: 0.449 and 0.226). The
published sizes are resized as mmpretrain evaluates them (s: shorter side 248 at 224 pixels, 426 at
384; m: 236 and 404). A safetensors checkpoint overrides these defaults by metadata image_size,
crop_pct, mean, std, labels (JSON), and options override both."""
EPILOG = f"""\
examples:
  riformer-kernels predict cat.jpg --checkpoint s12.safetensors --labels imagenet.txt
  riformer-kernels predict photos/ 'more/*.png' --checkpoint s12.safetensors --format csv > top5.csv
  riformer-kernels predict cat.jpg --checkpoint riformer-s12_in1k        (downloads it once)
  riformer-kernels predict digit.png --checkpoint digits.safetensors --image-size 28 --crop-pct 1 \\
      --mean 0.13 --std 0.31

{EXIT_CODES}"""


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, found {text!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="file, folder or pattern")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights: a .safetensors or .pth, or a published name (downloads)"
    )
    parser.add_argument(
        "--arch",
        metavar="NAME",
        help="checked against the checkpoint; a published name (riformer-s12_in1k) downloads it",
    )
    add_norm(parser)
    parser.add_argument("--image-size", type=integer(3), metavar="N", help="side of the crop in pixels")
    parser.add_argument("--crop-pct", type=number(0, 1), metavar="X", help="crop's share of the resized shorter side")
    parser.add_argument("--mean", type=_floats, metavar="R,G,B", help="subtracted, on the scale 0 to 1")
    parser.add_argument("--std", type=_floats, metavar="R,G,B", help="divided by, on the scale 0 to 1")
    parser.add_argument("--topk", type=integer(1), default=5, metavar="N", help="classes per image (default: 5)")
    parser.add_argument(
        "--labels", metavar="FILE", help="names of the classes: one per line, or JSON (a list, or {index: name})"
    )
    parser.add_argument("--batch-size", type=integer(1), default=16, metavar="N", help="images at a time (default: 16)")
    parser.add_argument(
        "--dtype", type=dtype, default="float32", metavar="NAME", help=f"{', '.join(COMPUTE)} (default: float32)"
    )
    add_backend(parser)
    parser.add_argument("--no-patch", action="store_true", help="plain PyTorch instead of the fused kernels")
    add_format(parser, "text", "json", "csv")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.checkpoint and not arguments.arch:
        raise CliError(_no_weights(arguments))
    _images.require_pillow()
    source = _source(arguments)
    how = _preprocessing(source, arguments)
    labels = _labels(arguments.labels, source)
    files, failed = _images.expand(arguments.images)
    for path, reason in failed:
        _complain(path, reason)
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    writer = csv.writer(sys.stdout, lineterminator="\n") if arguments.format == "csv" else None
    if writer:
        writer.writerow(("image", "rank", "class", "label", "probability"))
    served = None
    if files:
        model, served = _model(source, arguments)
        with progress("classifying", len(files)) as advance:
            for count, good, bad in _batches(model, files, how, labels, arguments):
                failed += bad
                for path, reason in bad:
                    _complain(path, reason)
                if writer:
                    writer.writerows(_csv_rows(good))
                results += good
                advance(count)
    if arguments.format == "json":
        document(
            {
                "model": {
                    "checkpoint": str(source.path),
                    "arch": arch_name(source.info.arch),
                    "classes": source.info.num_classes,
                    "dtype": arguments.dtype,
                    "backend": served,
                },
                "preprocessing": how.as_dict(),
                "images": results,
                "failed": [{"image": path, "reason": reason} for path, reason in failed],
            }
        )
    elif arguments.format == "text" and results:
        _print(results, labels is not None)
    if failed or not results:
        seconds = time.perf_counter() - started
        note(f"{len(results)} images classified in {seconds:.1f} s, {len(failed)} could not be")
        return 1
    return 0


def _no_weights(arguments: argparse.Namespace) -> str:
    return (
        f"there are no weights{f' for arch {arguments.arch}' if arguments.arch else ''}: nothing was classified, as "
        f"random weights predict nothing. Give --checkpoint FILE, or a published one by name, which downloads it: "
        f"{published_names()}"
    )


def _source(arguments: argparse.Namespace) -> Source:
    checkpoint = arguments.checkpoint
    if not checkpoint:
        if not is_published(arguments.arch):
            raise CliError(_no_weights(arguments))
        checkpoint = arguments.arch
    source = read(checkpoint)
    check_arch(source, arguments.arch)
    if not source.info.num_classes:
        raise CliError(f"{source.path} is a backbone without a classifier (no head.fc.weight); predict needs one")
    return source


def _preprocessing(source: Source, arguments: argparse.Namespace) -> _images.Preprocessing:
    import riformer

    name = next((n for n in (arguments.checkpoint, arguments.arch) if n and is_published(n)), None)
    return _images.preprocessing(
        source.info.in_channels,
        source.info.arch.name,
        source.metadata,
        riformer.find_entry(name).image_size if name else None,
        image_size=arguments.image_size,
        crop_pct=arguments.crop_pct,
        mean=arguments.mean,
        std=arguments.std,
    )


def _labels(file: str | None, source: Source) -> list[str] | None:
    """Names of the classes from ``--labels`` or the checkpoint's metadata, None if neither has any."""
    if file is None and "labels" not in source.metadata:
        return None
    where = file or f"{source.path}: metadata labels"
    try:
        text = Path(file).read_text("utf-8-sig") if file else source.metadata["labels"]
        if text.lstrip()[:1] in ("[", "{"):
            found = json.loads(text)
            if isinstance(found, dict):
                found = [found[str(index)] for index in range(len(found))]
            # {"0": ["n01440764", "tench"], ...} is how ImageNet's names are passed around.
            labels = [str(name[-1]) if isinstance(name, list) else str(name) for name in found]
        else:
            labels = [line.strip() for line in text.splitlines()]
            while labels and not labels[-1]:
                labels.pop()
    except (ValueError, KeyError, IndexError) as error:
        raise CliError(f"{where}: not one name per line and not JSON of a list or {{index: name}} ({error})") from error
    if len(labels) != source.info.num_classes:
        raise CliError(f"{where}: {len(labels)} names, the checkpoint has {source.info.num_classes} classes")
    return labels


def _model(source: Source, arguments: argparse.Namespace) -> tuple[nn.Module, str]:
    import riformer_kernels

    model = source.build(arguments.norm).to(torch_dtype(arguments.dtype))
    if arguments.no_patch:
        return model, "plain PyTorch (--no-patch)"
    try:
        handle = riformer_kernels.patch(model, compute_dtype=compute_dtype(arguments.dtype), backend=arguments.backend)
    except riformer_kernels.RIFormerKernelsError as error:
        code = 1 if isinstance(error, riformer_kernels.VerificationError) else 2
        raise CliError(f"{error}\n--no-patch classifies in plain PyTorch", code) from error
    return model, served_by(handle)


def _batches(
    model: nn.Module,
    files: list[str],
    how: _images.Preprocessing,
    labels: list[str] | None,
    arguments: argparse.Namespace,
) -> Iterator[tuple[int, list[dict[str, Any]], list[tuple[str, str]]]]:
    """Per batch: how many files it took, the predictions, and (file, reason) of those that failed."""
    import numpy as np
    import torch

    def attempt(path: str) -> Any:
        try:
            return _images.load(path, how)
        except _images.Unreadable as error:
            return error

    chunks = [files[at : at + arguments.batch_size] for at in range(0, len(files), arguments.batch_size)]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool, torch.inference_mode():
        loaded = [pool.submit(attempt, path) for path in chunks[0]]
        for index, chunk in enumerate(chunks):
            arrays = [future.result() for future in loaded]
            # The next batch is decoded while this one is classified.
            loaded = [pool.submit(attempt, path) for path in chunks[index + 1]] if index + 1 < len(chunks) else []
            bad = [
                (path, str(found)) for path, found in zip(chunk, arrays, strict=True) if isinstance(found, Exception)
            ]
            paths = [path for path, found in zip(chunk, arrays, strict=True) if not isinstance(found, Exception)]
            good = []
            if paths:
                batch = np.stack([found for found in arrays if not isinstance(found, Exception)])
                logits = model(torch.from_numpy(batch).to(torch_dtype(arguments.dtype))).float()
                for path, row in zip(paths, logits, strict=True):
                    if row.isfinite().all():
                        good.append(_prediction(path, row, labels, arguments.topk))
                    else:
                        bad.append(
                            (path, f"the model's output is not finite in {arguments.dtype}; try --dtype float32")
                        )
            yield len(chunk), good, bad


def _prediction(path: str, logits: Any, labels: list[str] | None, topk: int) -> dict[str, Any]:
    values, classes = logits.softmax(0).topk(min(topk, logits.numel()))
    return {
        "image": path,
        "predictions": [
            {"class": index, "label": labels[index] if labels else None, "probability": value}
            for index, value in zip(classes.tolist(), values.tolist(), strict=True)
        ],
    }


def _csv_rows(results: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for result in results:
        for rank, entry in enumerate(result["predictions"], 1):
            probability = f"{entry['probability']:.6g}"
            yield result["image"], rank, entry["class"], entry["label"] or "", probability


def _print(results: list[dict[str, Any]], labelled: bool) -> None:
    rows = []
    for result in results:
        for rank, entry in enumerate(result["predictions"]):
            name = (str(entry["class"]), entry["label"]) if labelled else (str(entry["class"]),)
            rows.append((result["image"] if rank == 0 else "", f"{100 * entry['probability']:.2f} %", *name))
    table(
        ("image", "probability", "class", "label") if labelled else ("image", "probability", "class"),
        rows,
        right=(1, 2),
    )


def _complain(path: str, reason: str) -> None:
    print(f"riformer-kernels: {printable(path)}: {printable(reason)}", file=sys.stderr, flush=True)
