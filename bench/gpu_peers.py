"""Who is compared on a GPU: ours by backend, alone, as a graph and as an ``Engine``, and what PyTorch itself offers.

PyTorch is given what makes it fast: cuDNN's search for algorithms (``cudnn.benchmark``), both memory formats, the 1x1
convolutions rewritten as ``F.linear``, a CUDA graph around each of these, and torch.compile max-autotune with its own
graphs and without. A form of ours or a peer that fails is a row with the reason.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_timing import Clock, at_most, graph_of
from peers_torch import quiet
from subject import LAYOUTS
from token_form import TokenForm
from torch import Tensor
from worker import describe

import riformer_kernels

OURS = "ours"  # and the backend
NCHW, CHANNELS_LAST = "NCHW", "channels_last"
COMPILE_SECONDS = 75.0
KEPT_SECONDS = 60.0  # for the measuring itself, after the last compilation

Call = Callable[[], object]
Contender = tuple[str, Call | None, str]


def patched(model: torch.nn.Module, size: int, backend: str) -> torch.nn.Module:
    twin = copy.deepcopy(model)
    riformer_kernels.patch(twin, verify=False, image_size=size, backend=backend)
    return twin


def attempted(name: str, make: Callable[[], Call]) -> Contender:
    """A contender that has been called once, or the reason why there is none."""
    try:
        call = make()
        call()
    except Exception as error:  # what PyTorch's compiler or a driver raises is of no common kind
        return name, None, describe(error)
    return name, call, ""


def ours(models: dict[str, torch.nn.Module], x: Tensor, size: int) -> Iterator[Contender]:
    """Each patched model: called, as a graph, and through an ``Engine`` from images on the GPU and on the CPU."""
    for name, model in models.items():
        call = lambda model=model: model(x)  # noqa: E731
        yield attempted(name, lambda call=call: call)
        yield attempted(f"{name} + graph", lambda call=call: graph_of(call))
        try:
            engine = riformer_kernels.Engine(model, (len(x),), size)
        except Exception as error:
            yield f"{name} Engine", None, describe(error)
            continue
        for title, images in ((f"{name} Engine", x), (f"{name} Engine, images on the CPU", x.cpu())):
            call = functools.partial(engine, images)
            yield attempted(title, lambda call=call: call)


def peers(model: torch.nn.Module, x: Tensor, compiled: bool, clock: Clock) -> Iterator[Contender]:
    """PyTorch's own ways."""
    laid_out = {name: x.contiguous(memory_format=LAYOUTS[name]) for name in (NCHW, CHANNELS_LAST)}
    forms = {"eager": model, "eager F.linear": TokenForm(copy.deepcopy(model)).eval()}
    for name, form in forms.items():
        for layout, images in laid_out.items():
            twin = copy.deepcopy(form).to(memory_format=LAYOUTS[layout])
            call = lambda twin=twin, images=images: twin(images)  # noqa: E731
            yield attempted(f"{name} {layout}", lambda call=call: call)
            yield attempted(f"{name} {layout} + graph", lambda call=call: graph_of(call))
    if not compiled:
        return
    for kind, form in forms.items():
        name = kind.replace("eager", "compile")
        layout = CHANNELS_LAST
        images = laid_out[layout]
        for mode in ("max-autotune-no-cudagraphs", "max-autotune"):
            title = f"{name} {layout}, {'without' if 'no-' in mode else 'with its'} graphs"
            seconds = min(COMPILE_SECONDS, clock.left() - KEPT_SECONDS)
            if seconds < 10:
                yield title, None, "no time left to compile it"
                continue
            made = attempted(title, functools.partial(_compiled, form, images, mode, seconds))
            yield made
            if made[1] is not None and "no-" in mode:
                call = made[1]
                yield attempted(f"{title} + graph", lambda call=call: graph_of(call))


def _compiled(form: torch.nn.Module, images: Tensor, mode: str, seconds: float) -> Call:
    """``form`` compiled within so many seconds."""
    twin: Any = torch.compile(
        copy.deepcopy(form).to(memory_format=LAYOUTS[CHANNELS_LAST]), mode=mode, dynamic=False, fullgraph=True
    )
    with at_most(seconds), torch._inductor.config.patch(freezing=True), quiet():
        for _ in range(3):  # its own graphs are recorded by the second call
            twin(images)
    return lambda: twin(images)
