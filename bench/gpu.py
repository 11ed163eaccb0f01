"""The patched model on a GPU, with each of its backends, against its peers: one command, at most eight minutes.

    python bench/gpu.py                       # S12 first, then the larger ones as far as the time goes
    python bench/gpu.py --arch s12 --batch 256 --no-compile --output results.jsonl
    python bench/gpu.py --backend cuda        # one of ours alone; the default is all that are usable

First come the machine's two ceilings: copy bandwidth and bf16 matrix rate. Then, for each arch and batch, the numbers
are checked by the error-ratio rule (a backend that fails is not timed), and the times are taken. Who is compared is
said in `gpu_peers.py`. All take turns in one process, timed by device events; batch 1 also by the wall clock, call by
call. It replays with weights in the L2 cache, for all alike. Each row is written when it is measured. What failed or
did not fit into the time is a row with the reason, and ends nothing but itself.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_timing
import torch
from gpu_kernels import fused_by, kernel_times, moved_bytes, profiled_times
from gpu_peers import OURS, ours, patched, peers
from gpu_timing import Clock, ceilings, interleaved, latencies, peak_bytes
from riformer.count import count_macs
from subject import random_images, random_model
from worker import describe

import riformer_kernels
from riformer_kernels import backends, numerics
from riformer_kernels.precision import convolutions_like_products
from riformer_kernels.timing import ratio

ARCHS = ("s12", "m48", "m36", "s24", "s36")  # in the order of interest: the two widths first
BATCHES = (256, 1, 64, 1024)
CHECKED = 16
BACKENDS = ("triton", "cuda")
LEAST_SECONDS = 20.0  # for a case without compiled peers


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Results:
    """The rows of a run. Each is in the file as soon as it is there, whatever comes after."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def checked(model: torch.nn.Module, call_on: torch.nn.Module, size: int, dtype: torch.dtype) -> numerics.ErrorRatios:
    """The error-ratio rule on 16 images, against float64 and eager PyTorch on this GPU."""
    x = random_images(CHECKED, size, dtype, seed=2).to(gpu_timing.DEVICE)
    with convolutions_like_products(x.device):
        eager = model(x)
    ratios = numerics.compare(call_on(x), eager, copy.deepcopy(model).double()(x.double()), dtype)
    if not ratios.passed:
        raise ValueError(f"not timed, the numbers are off: {', '.join(ratios.exceeded)}")
    return ratios


def measure(
    arch: str, batch: int, size: int, dtype: torch.dtype, top: dict[str, float], compiled: bool, clock: Clock,
    chosen: tuple[str, ...], add: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Add the rows of one arch and batch, ours first."""
    common = {"kind": "gpu", "arch": arch, "batch": batch, "size": size, "dtype": str(dtype).removeprefix("torch.")}
    model = random_model(arch, dtype).to(gpu_timing.DEVICE)
    x = random_images(batch, size, dtype).to(gpu_timing.DEVICE)
    mine: dict[str, torch.nn.Module] = {}
    errors: dict[str, numerics.ErrorRatios] = {}
    for backend in chosen:
        name = f"{OURS} {backend}"
        try:
            twin = patched(model, size, backend)
            errors[name] = checked(model, twin, size, dtype)
            mine[name] = twin
        except Exception as error:
            add({**common, "peer": name, "reason": describe(error)})
            say(f"{arch} batch {batch}: {name}: {describe(error)}")
    calls: dict[str, Callable[[], object]] = {}
    for contenders in (ours(mine, x, size), peers(model, x, compiled, clock)):
        for name, call, reason in contenders:
            say(f"{arch} batch {batch}: {name} {reason}")
            if call is None:
                add({**common, "peer": name, "reason": reason})
            else:
                calls[name] = call
    times = interleaved(calls)
    median = {name: samples.median for name, samples in times.items()}
    strongest = min((name for name in median if not name.startswith(OURS)), key=lambda name: median[name])
    flop = 2 * count_macs(arch, size, count="products")
    for name, samples in times.items():
        row = {
            **common, "peer": name, "reason": None, "ms": 1e3 * samples.median, "ms_p20": 1e3 * samples.p20,
            "ms_p80": 1e3 * samples.p80, "images_per_s": batch / samples.median, "strongest": strongest,
            "over_strongest": ratio(samples, times[strongest]).median,
            "tflop_per_s": batch * flop / samples.median / 1e12,
            "of_matrix_rate": batch * flop / samples.median / 1e12 / top["tflop_per_s"],
        }  # fmt: skip
        if batch == 1:
            row |= latencies(calls[name])
        backend_of = next((own for own in mine if name.startswith(own)), None)
        if backend_of is not None:
            moved = moved_bytes(arch, size, dtype, fused_by(backend_of.removeprefix(f"{OURS} "), batch, dtype))
            row["gbyte_per_s"] = batch * moved / samples.median / 1e9
            row["rms_error_over_eager"] = errors[backend_of].rms
        add(row)
    if "eager NCHW" in calls:
        eager = peak_bytes(calls["eager NCHW"])
        for name in mine:
            extra = peak_bytes(calls[name]) if name in calls else None
            add({**common, "kind": "memory", "peer": name, "extra_memory_bytes": extra,
                 "memory_over_eager": extra / eager if extra is not None and eager else None})  # fmt: skip
    for name, twin in mine.items():
        for kernel in _kernels(name, twin, x):
            add({**common, "kind": "kernel", "peer": name, **kernel})


def _kernels(name: str, model: torch.nn.Module, x: torch.Tensor) -> list[dict[str, Any]]:
    """The times of single kernels; none where the profiler does not work."""
    try:
        return (kernel_times if name.endswith("triton") else profiled_times)(model, x)
    except Exception as error:
        say(f"{name}: no times of single kernels: {describe(error)}")
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What this ran on. No host names, no paths."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "kind": "machine", "gpu": properties.name, "architecture": f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
        "torch": str(torch.__version__), "cuda": torch.version.cuda, "triton": _version("triton"),
        "cuda_kernels": backends.cuda.architectures(),
        "python": platform.python_version(), "riformer_kernels": riformer_kernels.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def shown(rows: list[dict[str, Any]]) -> list[str]:
    """The table that is printed."""
    header = ("arch", "batch", "peer", "ms", "images/s", "x strongest", "of matrix rate", "GB/s", "p50/p99 ms")
    texts = [header]
    for row in rows:
        name = row["arch"], str(row["batch"]), row["peer"]
        if row.get("ms") is None:
            texts.append((*name, *["-"] * 5, row["reason"] or ""))
            continue
        texts.append((
            *name, f"{row['ms']:.3f}", f"{row['images_per_s']:,.0f}", f"{row['over_strongest']:.2f}",
            f"{100 * row['of_matrix_rate']:.1f} %", f"{row['gbyte_per_s']:.0f}" if row.get("gbyte_per_s") else "-",
            f"{row['latency_ms_p50']:.3f}/{row['latency_ms_p99']:.3f}" if row.get("latency_ms_p50") else "-",
        ))  # fmt: skip
    widths = [max(len(text[i]) for text in texts) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(text, widths, strict=True)).rstrip() for text in texts]


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=sorted(ARCHS))
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--backend", nargs="+", default=BACKENDS, choices=BACKENDS, help="default: all that are usable")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes most of the time"
    )
    parser.add_argument("--seconds", type=float, default=450.0, help="for the whole command (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.jsonl")
    return parser.parse_args(argv)


def cases(archs: tuple[str, ...], batches: tuple[int, ...], compiles: bool) -> list[tuple[str, int, bool]]:
    """(arch, batch, with compiled peers), in order: first everything without torch.compile, which takes minutes for
    each case, then again with it where the targets are."""
    plain = [(arch, batch, False) for arch in archs for batch in batches]
    first = [(arch, batch, False) for arch, batch, _ in plain if arch in archs[:2] and batch in batches[:2]]
    late = [case for case in plain if case not in first]
    compiled = [("s12", batch, True) for batch in (256, 1) if compiles and "s12" in archs and batch in batches]
    return first + compiled + late


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_of(argv)
    reasons = {name: backends.ALL[name].unusable() for name in arguments.backend}
    chosen = tuple(name for name, reason in reasons.items() if reason is None)
    if not chosen:
        text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        say(f"nothing measured: no GPU to run on ({text})")
        return 2
    for name, reason in reasons.items():
        if reason:
            say(f"not measured, backend {name}: {reason}")
    clock, results, failed = Clock(arguments.seconds), Results(arguments.output), 0
    results.add(machine())
    dtype = getattr(torch, arguments.dtype)
    torch.backends.cudnn.benchmark = True  # the convolutions of the peers get the algorithm that is fastest here
    with torch.inference_mode():
        top = ceilings()
        results.add({"kind": "ceiling", **top})
        gpu = results.rows[0]["gpu"]
        print(f"{gpu}: copy {top['gbyte_per_s']:.0f} GB/s, bf16 product {top['tflop_per_s']:.0f} TFLOP/s", flush=True)
        for arch, batch, compiled in cases(tuple(arguments.arch), tuple(arguments.batch), not arguments.no_compile):
            every = {"kind": "gpu", "arch": arch, "batch": batch, "peer": "all"}
            if clock.left() < LEAST_SECONDS:
                results.add({**every, "reason": "no time left"})
                continue
            before = len(results.rows)
            try:
                measure(arch, batch, arguments.size, dtype, top, compiled, clock, chosen, results.add)
            except Exception as error:
                failed += 1
                say(f"{arch} batch {batch}: {describe(error)}")
                results.add({**every, "reason": describe(error)})
            new = [row for row in results.rows[before:] if row["kind"] == "gpu"]
            print("\n".join(shown(new)), flush=True)
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
    for row in results.rows:
        if row["kind"] == "kernel":
            width = f" C={row['C']}" if "C" in row else ""
            print(f"{row['arch']} batch {row['batch']} {row['peer']}  {row['kernel']}{width}: {row['us']:.1f} us")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
