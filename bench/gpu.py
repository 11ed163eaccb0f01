"""The patched model on a GPU, with each of its backends, against its peers: one command, at most eight minutes.

    python bench/gpu.py                       # S12 first, then the larger ones as far as the time goes
    python bench/gpu.py --arch s12 --batch 256 --no-compile --output results.jsonl
    python bench/gpu.py --backend cuda        # one of ours alone; the default is all that are usable

First come the machine's two ceilings: copy bandwidth and bf16 matrix rate. Then, for each arch and batch, the numbers
are checked by the error-ratio rule (a failure stops everything), and the times are taken. Peers: eager in two layouts,
and torch.compile max-autotune of the model and of its `F.linear` form, each also as a CUDA graph. Everything that is
compared takes turns in one process, timed by device events. A batch of 1 replays with weights in the L2 cache, for all
peers alike. What did not fit in the time is listed as not measured.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import fused_by, kernel_times, moved_bytes, profiled_times
from peers_torch import quiet
from riformer.count import count_macs
from subject import LAYOUTS, random_images, random_model
from token_form import TokenForm
from torch import Tensor
from worker import describe

import riformer_kernels
from riformer_kernels import backends, numerics
from riformer_kernels.timing import Samples, ratio, rotate

ARCHS = ("s12", "m36", "s24", "s36", "m48")  # in the order of interest: the two widths first
BATCHES = (256, 1, 64, 1024)
COPY_BYTES = 2 << 30
SIDE = 8192
SAMPLE_SECONDS = 0.02
ROUNDS = 9
CHECKED = 16
OURS = "ours"  # and the backend
BACKENDS = ("triton", "cuda")
NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


class Clock:
    """What is left of the time for the whole command."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ timing


def timed(call: Callable[[], object], calls: int) -> float:
    """Seconds per call, by device events around ``calls`` of them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def interleaved(functions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, Samples]:
    """`rotate` by the device's clock: each sample is of as many calls as take ``SAMPLE_SECONDS``."""
    samplers = {name: functools.partial(timed, function) for name, function in functions.items()}
    return rotate(samplers, 0.0, min_rounds=rounds, warmup=3, shortest=SAMPLE_SECONDS)


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and the rate of an 8192^3 bf16 product of random values."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source), "matrix": lambda: a @ b})
    median = {name: samples.median for name, samples in times.items()}
    return {"gbyte_per_s": 2 * COPY_BYTES / median["copy"] / 1e9, "tflop_per_s": 2 * SIDE**3 / median["matrix"] / 1e12}


# ------------------------------------------------------------------------------------------------------------- peers


def contenders(
    model: torch.nn.Module, x: Tensor, ours: dict[str, torch.nn.Module], compiled: bool, clock: Clock
) -> Iterator[tuple[str, Any, str]]:
    """(name, call on ``x``, reason why there is none); ``ours``: the patched models by name."""
    laid_out = {"NCHW": x, "channels_last": x.contiguous(memory_format=CHANNELS_LAST)}
    for name, patched in ours.items():
        yield name, lambda patched=patched: patched(laid_out["NCHW"]), ""
    for layout, images in laid_out.items():
        twin = copy.deepcopy(model).to(memory_format=LAYOUTS[layout])
        yield f"eager {layout}", lambda twin=twin, images=images: twin(images), ""
    if not compiled:
        return
    for name, form in (("compile", model), ("compile F.linear", TokenForm(copy.deepcopy(model)).eval())):
        for layout in ("channels_last", "NCHW"):
            if clock.left() < 150:
                yield f"{name} {layout}", None, "no time left to compile it"
                continue
            try:
                # Not under its own graph mode: every contender gets the same graph, below.
                twin = torch.compile(
                    copy.deepcopy(form).to(memory_format=LAYOUTS[layout]), mode="max-autotune-no-cudagraphs",
                    dynamic=False, fullgraph=True,
                )  # fmt: skip
                images = laid_out[layout]
                with torch._inductor.config.patch(freezing=True), quiet():
                    twin(images)
                yield f"{name} {layout}", lambda twin=twin, images=images: twin(images), ""
            except Exception as error:
                yield f"{name} {layout}", None, describe(error)


def checked(model: torch.nn.Module, call_on: torch.nn.Module, size: int, dtype: torch.dtype) -> numerics.ErrorRatios:
    """The error-ratio rule on 16 images, against float64 and eager PyTorch on this GPU."""
    x = random_images(CHECKED, size, dtype, seed=2).cuda()
    golden = copy.deepcopy(model).double()(x.double())
    ratios = numerics.compare(call_on(x), model(x), golden, dtype)
    if not ratios.passed:
        raise SystemExit(f"not timed, the numbers are off: {', '.join(ratios.exceeded)}")
    return ratios


def peak_bytes(call: Callable[[], object]) -> int:
    """Extra peak memory of one call."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


# ------------------------------------------------------------------------------------------------------------ a case


def measure(
    arch: str, batch: int, size: int, dtype: torch.dtype, top: dict[str, float], compiled: bool, clock: Clock,
    chosen: tuple[str, ...],
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one arch and batch, ours first."""
    model = random_model(arch, dtype).cuda()
    x = random_images(batch, size, dtype).cuda()
    calls: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    ours = {f"{OURS} {backend}": _patched(model, size, backend) for backend in chosen}
    ratios = {name: checked(model, patched, size, dtype) for name, patched in ours.items()}
    for name, call, reason in contenders(model, x, ours, compiled, clock):
        say(f"{arch} batch {batch}: {name} {reason}")
        if call is None:
            missing[name] = reason
            continue
        calls[name] = call
        try:
            calls[f"{name} + graph"] = graph_of(call)
        except Exception as error:
            missing[f"{name} + graph"] = describe(error)
    times = interleaved(calls)
    median = {name: samples.median for name, samples in times.items()}
    flop = 2 * count_macs(arch, size, count="products")
    moved = {f"{OURS} {backend}": moved_bytes(arch, size, dtype, fused_by(backend, batch, dtype)) for backend in chosen}
    memory = {name: peak_bytes(calls[name]) for name in (*ours, "eager NCHW")}
    common = {"kind": "gpu", "arch": arch, "batch": batch, "size": size, "dtype": str(dtype).removeprefix("torch.")}
    rows = []
    for name in [*calls, *missing]:
        row = {**common, "peer": name, "reason": missing.get(name)}
        if name in times:
            strongest = min((n for n in median if not n.startswith(OURS)), key=median.get)
            row |= {
                "ms": 1e3 * median[name], "ms_p20": 1e3 * times[name].p20, "ms_p80": 1e3 * times[name].p80,
                "images_per_s": batch / median[name],
                "strongest": strongest, "over_strongest": ratio(times[name], times[strongest]).median,
                "tflop_per_s": batch * flop / median[name] / 1e12,
                "of_matrix_rate": batch * flop / median[name] / 1e12 / top["tflop_per_s"],
            }  # fmt: skip
            if (mine := name.removesuffix(" + graph")) in ours:
                row["gbyte_per_s"] = batch * moved[mine] / median[name] / 1e9
                row["rms_error_over_eager"] = ratios[mine].rms
        row["extra_memory_bytes"] = memory.get(name)
        if name in ours:
            row["memory_over_eager"] = memory[name] / memory["eager NCHW"]
            row["kernels"] = (kernel_times if name.endswith("triton") else profiled_times)(ours[name], x)
        rows.append(row)
    torch._dynamo.reset()
    return rows


def _patched(model: torch.nn.Module, size: int, backend: str) -> torch.nn.Module:
    twin = copy.deepcopy(model)
    riformer_kernels.patch(twin, verify=False, image_size=size, backend=backend)
    return twin


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
    header = ("arch", "batch", "peer", "ms", "images/s", "x strongest", "of matrix rate", "GB/s", "memory")
    texts = [header]
    for row in rows:
        if row.get("ms") is None:
            texts.append((row["arch"], str(row["batch"]), row["peer"], "-", "-", "-", "-", "-", row["reason"] or ""))
            continue
        memory = row.get("memory_over_eager")
        texts.append((
            row["arch"], str(row["batch"]), row["peer"], f"{row['ms']:.3f}", f"{row['images_per_s']:,.0f}",
            f"{row['over_strongest']:.2f}", f"{100 * row['of_matrix_rate']:.1f} %",
            f"{row['gbyte_per_s']:.0f}" if row.get("gbyte_per_s") else "-",
            f"{memory:.2f}x eager" if memory else f"{row['extra_memory_bytes'] / 2**20:.0f} MiB"
            if row.get("extra_memory_bytes") else "-",
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
    clock, rows = Clock(arguments.seconds), [machine()]
    with torch.inference_mode():
        top = ceilings()
        rows.append({"kind": "ceiling", **top})
        print(f"{rows[0]['gpu']}: copy {top['gbyte_per_s']:.0f} GB/s, bf16 product {top['tflop_per_s']:.0f} TFLOP/s")
        for arch in arguments.arch:
            for batch in arguments.batch:
                if clock.left() < 30:
                    rows.append({"kind": "gpu", "arch": arch, "batch": batch, "peer": "all", "reason": "no time left"})
                    continue
                # torch.compile of every size would take an hour; it competes where the targets are.
                compiled = not arguments.no_compile and arch == "s12" and batch in (256, 1)
                try:
                    dtype = getattr(torch, arguments.dtype)
                    rows += measure(arch, batch, arguments.size, dtype, top, compiled, clock, chosen)
                except torch.OutOfMemoryError as error:
                    rows.append({"kind": "gpu", "arch": arch, "batch": batch, "peer": "all", "reason": describe(error)})
                gc.collect()
                torch.cuda.empty_cache()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = [row for row in rows if row["kind"] == "gpu"]
    for row in measured:
        for kernel in row.get("kernels", ()):
            width = f" C={kernel['C']}" if "C" in kernel else ""
            print(f"{row['arch']} batch {row['batch']}  {kernel['kernel']}{width}: {kernel['us']:.1f} us")
    print("\n".join(shown(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
