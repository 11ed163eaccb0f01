"""Compiling a backend's kernels when a model is patched, so that no request waits for the compiler."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import cast

import torch

from .errors import InputError
from .forward import run
from .modules import Backbone
from .patch_state import PatchState
from .program import Program
from .twin import twin_of

IMAGE_SIZE = 224


@contextlib.contextmanager
def compiling(backbone: Backbone, state: PatchState, image_size: int | tuple[int, int]) -> Iterator[None]:
    """Where the backend compiles: run a patched backbone once on one blank image per memory format, say so, and say in
    the end how long that took together with what the block did. (Verification compiles kernels for its own sizes.)

    Kernels do not depend on the batch, so one image is enough for all. A twin runs, so the user's hooks do not fire.

    Args:
        image_size: side, or (height, width), in pixels.

    Raises:
        InputError: the size is not one, or too small for the network.
    """
    program = state.program_for(backbone)
    lead = program.lead()
    backend = state.backend_for(lead.device, state.compute_dtype or lead.dtype)
    if not backend.compiles:
        yield
        return
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"image_size must be an integer or (height, width), in pixels, found {image_size!r}")
    dtype = str(state.compute_dtype or lead.dtype).removeprefix("torch.")
    _say(f"riformer_kernels: compiling {backend.name} kernels for {size[0]} x {size[1]} pixels, {dtype} ...")
    start = time.perf_counter()
    try:
        _run_blank_images(backbone, state, program, size)
        own = time.perf_counter() - start
        yield
    except BaseException:
        _say(f" failed after {time.perf_counter() - start:.1f} s\n")
        raise
    total = time.perf_counter() - start
    verification = f", {total - own:.1f} s of them for verification" if total - own >= 0.05 else ""
    _say(f" {total:.1f} s{verification}\n")


def _run_blank_images(backbone: Backbone, state: PatchState, program: Program, size: tuple[int, ...]) -> None:
    lead = program.lead()
    twin = cast("Backbone", twin_of(backbone, lambda _, parameter: parameter.detach(), lead.dtype))
    of_twin = Program(twin, program.plan)
    shape = (1, program.plan.stem.in_channels or lead.shape[1], *size)
    with torch.no_grad(), torch.autocast(lead.device.type, enabled=False):
        image = torch.zeros(shape, dtype=lead.dtype, device=lead.device)
        for layout in (torch.contiguous_format, torch.channels_last):
            run(twin, of_twin, state, image.contiguous(memory_format=layout))


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
