"""Compiling a backend's kernels when a model is patched, so that no request waits for the compiler."""

from __future__ import annotations

import sys
import time

import torch

from .errors import InputError
from .forward import run
from .modules import Backbone
from .patch_state import PatchState

IMAGE_SIZE = 224


def compile_kernels(backbone: Backbone, state: PatchState, image_size: int | tuple[int, int]) -> None:
    """Run a patched backbone once on one blank image per memory format, and say so, if its backend compiles.

    Kernels do not depend on the batch, so one image is enough for all.

    Args:
        image_size: side, or (height, width), in pixels.

    Raises:
        InputError: the size is not one, or too small for the network.
    """
    program = state.program_for(backbone)
    lead = program.lead()
    backend = state.backend_for(lead.device, state.compute_dtype or lead.dtype)
    if not backend.compiles:
        return
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"image_size must be an integer or (height, width), in pixels, found {image_size!r}")
    dtype = str(state.compute_dtype or lead.dtype).removeprefix("torch.")
    _say(f"riformer_kernels: compiling {backend.name} kernels for {size[0]} x {size[1]} pixels, {dtype} ...")
    start = time.perf_counter()
    shape = (1, program.plan.stem.in_channels or lead.shape[1], *size)
    with torch.no_grad(), torch.autocast(lead.device.type, enabled=False):
        image = torch.zeros(shape, dtype=lead.dtype, device=lead.device)
        for layout in (torch.contiguous_format, torch.channels_last):
            run(backbone, program, state, image.contiguous(memory_format=layout))
    _say(f" {time.perf_counter() - start:.1f} s\n")


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
