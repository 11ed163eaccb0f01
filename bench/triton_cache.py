"""Compile the Triton kernels of all architectures of RIFormer into Triton's cache, in parallel and without a GPU.

    python bench/triton_cache.py 90 --jobs 14       # for compute capability 9.0

On a machine that is lent for minutes, compiling four hundred variants one after the other as they are called would
take most of them. What is compiled goes the way of a launch (``JITFunction.warmup``), so its place in the cache is the
one where a launch looks. Every process records all launches, which takes a second, and compiles its share.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of interest
IMAGES = (224, 384, 96)
BRANCH = (7, 9)  # positions of the branches that verification compares


def launches(architecture: int) -> Iterator:
    """Every launch of the networks in their forms, and of verification; many are alike."""
    from riformer_kernels.backends.triton import ahead

    for dtype in DTYPES:
        for options in ({"image": image} for image in IMAGES):
            yield from ahead.network(architecture, dtype, **options)
        yield from _branches(architecture, dtype)
    for dtype in DTYPES:
        for options in ({"training": True}, {"per_position": True}, {"per_position": True, "training": True}):
            yield from ahead.network(architecture, dtype, **options)


def _branches(architecture: int, dtype: torch.dtype) -> Iterator:
    """What ``verification`` launches of each block: without the residual, with no second layer scale."""
    from riformer_kernels.backends.triton import ahead, block, moments

    for c in sorted({width for widths in ahead.WIDTHS for width in widths}):
        x = torch.empty((2, c, *BRANCH), dtype=dtype, device="meta")
        vector, statistics = torch.empty(c, dtype=dtype, device="meta"), torch.empty((2, 2, c), device="meta")
        fc1, fc2 = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((4 * c, c, 1, 1), (c, 4 * c, 1, 1)))
        bias = torch.empty(4 * c, dtype=dtype, device="meta")
        yield from ahead.record(architecture, moments.moments, x)
        yield from ahead.record(
            architecture, block.block, x, statistics, vector, vector, vector, None, None, ahead.EPS, vector, vector,
            ahead.EPS, fc1, bias, fc2, vector, None, False, False,
        )  # fmt: skip


def compile_share(architecture: int, share: int, shares: int) -> int:
    """Compile every ``shares``-th different launch, from ``share`` on; returns how many."""
    import triton
    from triton.backends.compiler import GPUTarget

    from riformer_kernels.backends.triton import ahead

    # In place of the driver: which GPU is meant. So no process opens the GPU, and none is needed.
    target = GPUTarget("cuda", architecture, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )
    )
    seen: set[tuple[str, int]] = set()
    done = 0
    for launch in launches(architecture):
        key = ahead.source(launch).hash(), launch.settings["num_warps"]
        if key in seen:
            continue
        seen.add(key)
        if len(seen) % shares == share:
            arguments = [value.dtype if isinstance(value, torch.Tensor) else value for value in launch.arguments]
            launch.kernel.warmup(*arguments, grid=(1,), **launch.settings, enable_fp_fusion=True)
            done += 1
    return done


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", type=int, help="compute capability as 80, 90, ...")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.share is not None:
        print(compile_share(arguments.architecture, arguments.share, arguments.jobs))
        return 0
    start = time.perf_counter()
    command = [sys.executable, __file__, str(arguments.architecture), "--jobs", str(arguments.jobs), "--share"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(share)], stdout=subprocess.PIPE, text=True, env=environment)
        for share in range(arguments.jobs)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    failed = [worker.returncode for worker in workers if worker.returncode]
    count = sum(int(output) for output, worker in zip(outputs, workers, strict=True) if not worker.returncode)
    took = time.perf_counter() - start
    print(f"triton_cache: {count} variants for sm_{arguments.architecture} in {took:.0f} s, {arguments.jobs} jobs")
    if failed:
        print(f"triton_cache: {len(failed)} of {arguments.jobs} jobs failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
