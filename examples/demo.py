"""The main job on real input: scanned digits classified, and two photographs run through S12, plain and patched.

    make demo                       # sets everything up and runs this
    python examples/demo.py         # once riformer-kernels[demo] is installed

(a) A small RIFormer, trained by examples/digits/train.py, classifies the 1,000 digits that its training never saw.
(b) RIFormer-S12 with hard random parameters computes the features of two photographs in float32 and bfloat16.

Exit code 0 only if at least 95 % of the digits are right, plain and patched give the same answers, and every error
against float64 is within the limits that eager PyTorch's own error sets. Speed is shown and not judged.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import riformer
    import torch
    from riformer_cli._output import table
    from torch import Tensor, nn

    import riformer_kernels
    from riformer_kernels import numerics
    from riformer_kernels.machine import cpu_name
    from riformer_kernels.timing import Samples, interleave, ratio
except ModuleNotFoundError as error:
    sys.exit(f"demo: error: {error.name} is not installed. Run: make demo (or pip install 'riformer-kernels[demo]')")

import _digits
import _photos

CHECKPOINT = Path(__file__).parent / "digits" / "riformer_digits.safetensors"
LEAST_ACCURACY = 0.95
DIGITS_PER_CALL = 100
BATCHES, QUICK_BATCHES = (1, 16), (1, 4)
DTYPES = (torch.float32, torch.bfloat16)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and photographs; times are rough")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of the digits' RIFormer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also save all figures to this file")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    print(f"riformer_kernels {riformer_kernels.__version__} on real input")
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} thread{'s' if threads > 1 else ''}, {cpu_name()}", flush=True)
    problems: list[str] = []
    try:
        with torch.inference_mode():
            digits = digits_part(arguments.checkpoint, arguments.quick, problems)
            photos = photos_part(arguments.quick, problems)
    except (_digits.DataError, riformer.CheckpointError, riformer_kernels.RIFormerKernelsError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        figures = {
            "riformer_kernels": riformer_kernels.__version__, "torch": torch.__version__, "processor": cpu_name(),
            "threads": threads, "quick": arguments.quick, "passed": not problems, "problems": problems,
            "digits": digits, "photos": photos,
        }  # fmt: skip
        try:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
        except OSError as error:
            print(f"demo: error: cannot write {arguments.json}: {error.strerror}", file=sys.stderr)
            return 1
    print()
    for problem in problems:
        print(f"  problem: {problem}")
    print(_verdict(digits, photos, problems, time.perf_counter() - start))
    return 1 if problems else 0


def _verdict(digits: dict[str, Any], photos: list[dict[str, Any]], problems: list[str], seconds: float) -> str:
    if problems:
        return f"FAILED in {seconds:.0f} s: {len(problems)} problem{'s' if len(problems) > 1 else ''}, see above"
    largest = max(row["batch"] for row in photos)
    speed = ", ".join(
        f"{row['dtype']} {min(row['speedup'], row['speedup_channels_last']):.1f}x"
        for row in photos if row["batch"] == largest
    )  # fmt: skip
    return (
        f"PASSED in {seconds:.0f} s: digits {digits['accuracy']['patched']:.1%}, "
        f"answers equal{'' if digits['agreeing'] == digits['of'] else ' up to ties'}, errors within limits; S12 {speed}"
    )


def _per_item(samples: Samples, items: int) -> str:
    """Median milliseconds per item with half the spread, as text."""
    milliseconds = 1e3 * samples.median / items
    return f"{milliseconds:{'.3g' if milliseconds < 1000 else ',.0f'}} ±{samples.spread / 2:.0%}"


# ----------------------------------------------------------------------------------------------------------- digits


def load_digits_model(path: Path) -> riformer.RIFormer:
    """The checkpoint as a model of the form and size that it has, in evaluation mode. Raises CheckpointError."""
    weights = riformer.load_checkpoint(path)
    info = riformer.infer_arch(weights)
    if (info.in_channels, info.num_classes) != (1, 10):
        raise riformer.CheckpointError(
            f"{path} is for {info.in_channels} input channels and {info.num_classes} classes; expected 1 and 10, as "
            "examples/digits/train.py writes it"
        )
    model = info.build()
    riformer.load_into(model, weights)
    return model.eval()


def digits_part(checkpoint: Path, quick: bool, problems: list[str]) -> dict[str, Any]:
    """Classify the held-out digits; print the result, add what is wrong to ``problems``, return the figures."""
    trained = load_digits_model(checkpoint)
    _, held_out = _digits.split(_digits.load())
    images = _digits.to_input(held_out.images)
    deployed = copy.deepcopy(trained).switch_to_deploy()
    patched = copy.deepcopy(deployed)
    riformer_kernels.patch(patched)

    models = {"training-time": trained, "deployed": deployed, "patched": patched}
    logits = {name: _logits(model, images) for name, model in models.items()}
    golden = _logits(copy.deepcopy(deployed).double(), images.double())
    accuracy = {name: (found.argmax(1) == held_out.labels).double().mean().item() for name, found in logits.items()}
    times = interleave(
        {name: lambda model=model: _logits(model, images) for name, model in models.items()},
        1 if quick else 3, min_rounds=2, max_rounds=2 if quick else 11, warmup=1,
    )  # fmt: skip

    parameters = riformer.count_parameters(trained)
    print(f"\n(a) {len(held_out):,} held-out scanned digits, RIFormer of {parameters:,} parameters")
    print("    Plain PyTorch in training-time and deployed form, then patched, all in float32.")
    print("    Times: median of interleaved rounds ± half the span from the 20th to the 80th percentile.")
    print("    Errors: against float64.\n")
    rows = []
    for name, value in accuracy.items():
        figures, speed = numerics.figures(logits[name], golden), ratio(times[name], times["deployed"]).median
        cells = (_per_item(times[name], len(held_out)), f"{speed:.2f}x", f"{figures.max:.1e}", f"{figures.rms:.1e}")
        rows.append((name, f"{value:.1%}", *cells))
    header = ("model", "accuracy", "ms/image", "speed-up", "max error", "RMS error")
    table(header, rows, right=range(1, len(header)))

    difference = (logits["patched"].double() - logits["deployed"].double()).abs()
    ratios = numerics.compare(logits["patched"], logits["deployed"], golden)
    equal = int((logits["patched"].argmax(1) == logits["deployed"].argmax(1)).sum())
    unexplained = int((_disagreements(logits["patched"], logits["deployed"], golden)).sum())
    rms, largest = difference.square().mean().sqrt().item(), golden.abs().max().item()
    print(f"\nanswers  patched and plain agree on {equal:,} of {len(held_out):,}")
    print(f"logits   patched against plain: max {difference.max():.1e}, RMS {rms:.1e} (logits up to {largest:.1f})")
    print("\nerror of the logits against float64, as a multiple of plain PyTorch's\n")
    _error_table([("float32", len(held_out), ratios)])

    problems += [
        f"digits, {name}: accuracy {value:.1%}, expected at least {LEAST_ACCURACY:.0%}"
        for name, value in accuracy.items() if not value >= LEAST_ACCURACY
    ]  # fmt: skip
    if unexplained:
        problems.append(f"digits: {unexplained} predictions differ by more than float32 rounding explains")
    if not ratios.passed:
        problems.append(f"digits: error of the patched model too large: {', '.join(ratios.exceeded)}")
    return {
        "accuracy": accuracy, "agreeing": equal, "of": len(held_out), "unexplained": unexplained,
        "max_difference": difference.max().item(), "rms_difference": rms, "ratios": ratios.as_dict(),
        "ms_per_image": {name: 1e3 * value.median / len(held_out) for name, value in times.items()},
        "spread": {name: value.spread for name, value in times.items()},
        "speedup": ratio(times["patched"], times["deployed"]).median,
    }  # fmt: skip


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(DIGITS_PER_CALL)])


def _disagreements(ours: Tensor, eager: Tensor, golden: Tensor) -> Tensor:
    """Which images ``[n]`` get another answer from us than from eager, without being a tie.

    A tie: float64's two largest logits are so close that errors within the limits can swap them. Our error may be
    twice eager's, and both logits may have it.
    """
    best = golden.topk(2, dim=1).values
    tie = best[:, 0] - best[:, 1] <= 4 * (eager.double() - golden).abs().max()
    return (ours.argmax(1) != eager.argmax(1)) & ~tie


def _error_table(rows: Sequence[tuple[str, int, numerics.ErrorRatios]]) -> None:
    """Print the four ratios of each (dtype, batch, ratios), below those of one dtype their limits."""
    names, cells = ("max", "rms", "channel", "position"), []
    for index, (dtype, batch, ratios) in enumerate(rows):
        four = [f"{getattr(ratios, name):.2f}x" for name in names]
        cells.append((dtype, f"{batch:,}", f"{ratios.ours.rms:.1e}", *four, "passed" if ratios.passed else "FAILED"))
        if index + 1 == len(rows) or rows[index + 1][0] != dtype:
            cells.append((dtype, "limit", "", *(f"{getattr(ratios.limits, name):g}x" for name in names), ""))
    header = ("dtype", "batch", "our RMS", "max", "RMS", "channel", "position", "result")
    table(header, cells, right=range(1, 7))


# ----------------------------------------------------------------------------------------------------------- photos


def photos_part(quick: bool, problems: list[str]) -> list[dict[str, Any]]:
    """Run S12 on the photographs; print the result, add what is wrong to ``problems``, return one dict per row."""
    batches = QUICK_BATCHES if quick else BATCHES
    images = _photos.batch(_photos.load(), max(batches))
    print(f"\n(b) photographs {' and '.join(_photos.NAMES)} at {_photos.CROP} x {_photos.CROP}, RIFormer-S12 backbone,")
    print("    hard random parameters: every block changes the result, as it would not with fresh ones\n", flush=True)
    found = [row for dtype in DTYPES for row in _photos_in(dtype, images, batches, quick)]

    print("\nerror of the last feature map against float64, as a multiple of eager PyTorch's\n")
    _error_table([(row["dtype"], row["batch"], row["ratios"]) for row in found])
    for row in found:
        exceeded = row["ratios"].exceeded
        if exceeded:
            problems.append(f"S12 in {row['dtype']}, batch {row['batch']}: error too large: {', '.join(exceeded)}")

    print("\nms per image: eager PyTorch, the same in channels_last (NHWC), patched; speed-up over both\n")
    rows = []
    for row in found:
        faster = (f"{row['speedup']:.2f}x", f"{row['speedup_channels_last']:.2f}x")
        rows.append((row["dtype"], str(row["batch"]), *row.pop("cells"), *faster))
        row["ratios"] = row["ratios"].as_dict()
    header = ("dtype", "batch", "eager", "eager NHWC", "patched", "speed-up", "vs NHWC")
    table(header, rows, right=range(1, len(header)))
    return found


def _photos_in(dtype: torch.dtype, images: Tensor, batches: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """The figures of one dtype, one dict per batch size. The float32 handle is printed: it says what was replaced."""
    eager = riformer.randomize_(riformer.RIFormer("s12", deploy=True)).to(dtype).eval()
    golden_model = copy.deepcopy(eager).double()
    channels_last = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    patched = copy.deepcopy(eager)
    handle = riformer_kernels.patch(patched)
    if dtype == torch.float32:
        print(handle, flush=True)
    images = images.to(dtype)
    golden = golden_model(images.double())[0]
    rows = []
    for size in batches:
        x = images[:size]
        x_last = x.contiguous(memory_format=torch.channels_last)
        ratios = numerics.compare(patched(x)[0], eager(x)[0], golden[:size])
        calls = {
            "eager": lambda x=x: eager(x),
            "channels_last": lambda x=x_last: channels_last(x),
            "patched": lambda x=x: patched(x),
        }
        seconds, rounds = (1, 2) if quick else (6, 7) if size > 1 else (2, 21)
        times = interleave(calls, seconds, min_rounds=2 if quick else 3, max_rounds=rounds, warmup=1)
        rows.append({
            "dtype": str(dtype).removeprefix("torch."), "batch": size, "ratios": ratios,
            "cells": [_per_item(times[name], size) for name in calls],
            "ms_per_image": {name: 1e3 * value.median / size for name, value in times.items()},
            "spread": {name: value.spread for name, value in times.items()},
            "speedup": ratio(times["patched"], times["eager"]).median,
            "speedup_channels_last": ratio(times["patched"], times["channels_last"]).median,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
