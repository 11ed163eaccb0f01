"""Our kernels one by one on a GPU: how long each takes, and how many bytes they have to move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import riformer
import torch
from torch import Tensor

from riformer_kernels import backends
from riformer_kernels.timing import percentile


@contextmanager
def launches(found: list[tuple[str, int, Any, Any]]) -> Iterator[None]:
    """Inside the block, record name, C and two device events of every launch of ours."""
    from riformer_kernels.backends.triton import block, block_maps, embed, head, moments, norm

    modules = (block, block_maps, embed, head, moments, norm)
    original = block.launch

    def launch(kernel, programs, device, *arguments, **settings):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        original(kernel, programs, device, *arguments, **settings)
        events[1].record()
        found.append((kernel.__name__.strip("_"), settings.get("C", 0), *events))

    for module in modules:
        module.launch = launch
    try:
        yield
    finally:
        for module in modules:
            module.launch = original


def profiled_times(model: torch.nn.Module, x: Tensor, repeats: int = 5) -> list[dict[str, Any]]:
    """Microseconds of every kernel by name, as PyTorch's profiler has them, summed over a forward."""
    model(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            model(x)
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0]
    return [{"kernel": event.key, "us": event.device_time_total / repeats} for event in events]


def kernel_times(model: torch.nn.Module, x: Tensor, repeats: int = 5) -> list[dict[str, Any]]:
    """Microseconds of Triton's kernels per kernel and width, summed over a forward.

    The GPU is kept busy while the launches queue up, so that no gap between them is measured.
    """
    model(x)
    sums: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        found: list[tuple[str, int, Any, Any]] = []
        torch.cuda._sleep(200_000_000)
        with launches(found):
            model(x)
        torch.cuda.synchronize()
        once: dict[tuple[str, int], float] = {}
        for name, width, start, end in found:
            once[name, width] = once.get((name, width), 0.0) + 1e3 * start.elapsed_time(end)
        for key, value in once.items():
            sums.setdefault(key, []).append(value)
    return [{"kernel": name, "C": width, "us": percentile(values, 0.5)} for (name, width), values in sums.items()]


def fused_by(backend: str, batch: int, dtype: torch.dtype) -> Callable[[int, int], bool]:
    """Whether the backend runs a block of (channels, positions) as one kernel on this GPU."""
    if backend == "triton":
        from riformer_kernels.backends.triton.choice import FUSED_CHANNELS

        return lambda channels, positions: channels <= FUSED_CHANNELS
    properties = torch.cuda.get_device_properties(0)
    gpu = 10 * properties.major + properties.minor, properties.multi_processor_count
    return lambda channels, positions: (
        "fused" in backends.cuda.block_choice(batch, channels, 4 * channels, positions, dtype, *gpu)
    )


def moved_bytes(arch: riformer.arch.ArchLike, size: int, dtype: torch.dtype, fused: Callable[[int, int], bool]) -> int:
    """Bytes per image that our kernels move at least: every tensor between two launches, written once and read once."""
    shape = riformer.arch.resolve_arch(arch)
    side, inputs, total = size, 3, 0
    for stage, (depth, c) in enumerate(zip(shape.layers, shape.embed_dims, strict=True)):
        kernel, stride, padding = (3, 2, 1) if stage else (7, 4, 2)
        before, side = side, (side + 2 * padding - kernel) // stride + 1
        total += inputs * before**2 + c * side**2
        wide = not fused(c, side**2)
        # Fused: x in, out. Otherwise also the hidden tensor out and in, and x once more for the residual.
        total += depth * c * side**2 * (2 + (1 + 8 if wide else 0))
        inputs = c
    return total * dtype.itemsize
