"""``riformer-kernels bench``: the patched model side by side with PyTorch, in one process."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._arguments import EXIT_CODES, add_backend, add_format, dtype, integer, number, several
from ._models import compute_dtype, machine, random_model, served_by, torch_dtype
from ._output import document, note, progress, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from riformer_kernels.timing import Samples

SUMMARY = "how fast, side by side with eager PyTorch (and torch.compile)"
DESCRIPTION = """\
Time the patched model side by side with eager PyTorch, NCHW and channels_last, and with torch.compile.

Timed is the forward pass alone: deployed form, random parameters, evaluation mode,
torch.inference_mode(), input already in the dtype and, for channels_last, in that layout. The variants
take turns in one process, so that a busy machine slows all of them alike; shown are the median and
the 20th and 80th percentile. The patched model's numbers are verified first (exit 1 if they are
off). This is a quick look; the folder bench/ of the source has the real benchmark."""
EPILOG = f"""\
examples:
  riformer-kernels bench
  riformer-kernels bench --arch m36 --batch 1 --dtype bfloat16 --seconds 20
  riformer-kernels bench --compile --threads 1        (compiles for minutes)

{EXIT_CODES}"""

PATCHED = "patched"
LEAST_ROUNDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", metavar="NAME", default="s12", help="s12, s24, s36, m36 or m48 (default: s12)")
    parser.add_argument(
        "--batch", type=several(integer(1)), default=[1, 16], metavar="LIST", help="batch sizes (default: 1,16)"
    )
    parser.add_argument(
        "--dtype",
        type=several(dtype),
        default=["float32", "bfloat16"],
        metavar="LIST",
        help="dtypes, separated by commas, or int8, whose peers are bfloat16 (default: float32,bfloat16)",
    )
    parser.add_argument("--image-size", type=integer(3), default=224, metavar="N", help="side in pixels (default: 224)")
    parser.add_argument(
        "--threads", type=integer(1, 1024), metavar="N", help="PyTorch's threads (default: its own choice)"
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile (max-autotune, freezing)")
    parser.add_argument(
        "--seconds", type=number(0, 3600), default=5.0, metavar="S", help="measured per dtype and batch (default: 5)"
    )
    add_backend(parser)
    add_format(parser, "text", "json")


def run(arguments: argparse.Namespace) -> int:
    from riformer_kernels.machine import threads

    _warn_if_busy()
    with threads(arguments.threads):
        model = random_model(arguments.arch, seed=0, deploy=True)
        results = []
        with progress("bench", len(arguments.dtype) * len(arguments.batch)) as advance:
            for name in arguments.dtype:
                variants = _variants(model, name, arguments, advance)
                for batch in arguments.batch:
                    advance(0, f"{name}, batch {batch}")
                    results.append(_configuration(variants, name, batch, arguments))
                    advance()
        where = machine()
    timed = (
        f"forward only, deployed {arguments.arch} at {arguments.image_size} x {arguments.image_size}, "
        f"torch.inference_mode(), input already in the dtype, {where['threads']} threads, variants interleaved"
    )
    failures = {row["variant"] for result in results for row in result["rows"] if row["error"]}
    if arguments.format == "json":
        settings = {"arch": arguments.arch, "image_size": arguments.image_size, "seconds": arguments.seconds}
        document({"timed": timed, **settings, "machine": where, "results": results})
    else:
        _print(timed, where, results)
    return 1 if failures else 0


def _warn_if_busy() -> None:
    if hasattr(os, "getloadavg"):
        load, cpus = os.getloadavg()[0], os.cpu_count() or 1
        if load > 0.5 * cpus:
            note(f"this machine is busy (load {load:.1f} on {cpus} CPUs): take the figures with caution")


class _Variant:
    """One way to run the model: ``call(x)``, the layout of its input, who serves it; ``error`` once it has failed."""

    def __init__(self, name: str, call: Callable, channels_last: bool, detail: str) -> None:
        self.name, self.call, self.channels_last, self.detail = name, call, channels_last, detail
        self.error: str | None = None


def _variants(
    model: nn.Module, name: str, arguments: argparse.Namespace, advance: Callable[..., None]
) -> list[_Variant]:
    import torch

    import riformer_kernels

    plain = copy.deepcopy(model).to(torch_dtype(name))
    last: Any = copy.deepcopy(plain)
    last.to(memory_format=torch.channels_last)
    patched = copy.deepcopy(plain)
    advance(0, f"{name}: verifying")
    # Raises VerificationError, exit 1, before anything is timed.
    handle = riformer_kernels.patch(patched, compute_dtype=compute_dtype(name), backend=arguments.backend)
    found = [
        _Variant("eager NCHW", plain, False, "PyTorch"),
        _Variant("eager channels_last", last, True, "PyTorch"),
        _Variant(PATCHED, patched, False, served_by(handle)),
    ]
    if arguments.compile:
        options: dict[str, Any] = {"max_autotune": True, "freezing": True}
        compiled = torch.compile(copy.deepcopy(last), options=options, dynamic=False)
        found.insert(2, _Variant("torch.compile", compiled, True, "PyTorch, max-autotune, freezing"))
    return found


def _configuration(variants: list[_Variant], name: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all variants for one dtype and batch size."""
    import torch

    from riformer_kernels.timing import interleave

    size = arguments.image_size
    x = torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch_dtype(name))
    inputs = {False: x, True: x.contiguous(memory_format=torch.channels_last)}
    with torch.inference_mode():
        for variant in variants:
            _warm_up(variant, inputs[variant.channels_last])
        calls = {
            variant.name: lambda variant=variant: variant.call(inputs[variant.channels_last])
            for variant in variants
            if variant.error is None
        }
        times = interleave(calls, arguments.seconds, min_rounds=LEAST_ROUNDS, warmup=1)
    rows = [_row(variant, times.get(variant.name), batch) for variant in variants]
    peers = [row for row in rows if row["variant"] != PATCHED and not row["error"]]
    best = min(peers, key=lambda row: row["median_ms"])
    for row in rows:
        row["vs_best_peer"] = None if row["error"] else best["median_ms"] / row["median_ms"]
    return {"dtype": name, "batch": batch, "rounds": times[PATCHED].rounds, "best_peer": best["variant"], "rows": rows}


def _warm_up(variant: _Variant, x: torch.Tensor) -> None:
    """The first call, which compiles; a torch.compile that fails is noted and left out."""
    try:
        variant.call(x)
    except Exception as error:
        if variant.name != "torch.compile":
            raise
        # Most often no C++ compiler, or one that fails.
        variant.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        note(f"torch.compile cannot be measured here: {variant.error}")


def _row(variant: _Variant, samples: Samples | None, batch: int) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": variant.name, "served_by": variant.detail, "error": variant.error}
    if samples is None:
        return row | dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "images_per_s"))
    times = {"median_ms": 1e3 * samples.median, "p20_ms": 1e3 * samples.p20, "p80_ms": 1e3 * samples.p80}
    return row | times | {"images_per_s": batch / samples.median}


def _print(timed: str, where: dict[str, Any], results: list[dict[str, Any]]) -> None:
    print(f"timed: {timed}")
    print(f"on: {where['cpu']}, torch {where['torch']}; numbers verified first by the error-ratio rule")
    header = ("variant", "served by", "median ms", "p20", "p80", "images/s", "vs best peer")
    for result in results:
        rows = []
        for row in result["rows"]:
            figures = ["-"] * 5
            if not row["error"]:
                figures = [f"{row[key]:.2f}" for key in ("median_ms", "p20_ms", "p80_ms")]
                figures += [f"{row['images_per_s']:.1f}", f"{row['vs_best_peer']:.2f}x"]
            rows.append((row["variant"], row["served_by"], *figures))
        print()
        title = f"{result['dtype']}, batch {result['batch']} ({result['rounds']} rounds)"
        table(header, rows, title=title, right=range(2, 7))
        ours = next(row for row in result["rows"] if row["variant"] == PATCHED)
        print(f"patched: {ours['vs_best_peer']:.2f}x the best peer ({result['best_peer']})")
