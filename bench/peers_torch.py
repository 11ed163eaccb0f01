"""The peers that are PyTorch: ours, eager in both layouts, torch.compile, each on both forms of the model."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from subject import LAYOUTS, NCHW, REWRITTEN, UNCHANGED, Peer, Subject
from token_form import token_form
from torch import Tensor, nn
from worker import describe

import riformer_kernels
from riformer_kernels.timing import interleave

OURS = "ours"


def ours(subject: Subject) -> Peer:
    """The patched model; verification by `patch` itself included."""
    model = copy.deepcopy(subject.model)
    handle = riformer_kernels.patch(model)
    served = ", ".join(dict.fromkeys(row.backend for row in handle.report if row.backend))
    return Peer(OURS, UNCHANGED, model, NCHW, served)


def _eager(name: str, form: str, model: nn.Module, layout: str) -> Peer:
    return Peer(name, form, model.to(memory_format=LAYOUTS[layout]), LAYOUTS[layout], f"PyTorch eager, {layout}")


def eager(subject: Subject) -> Peer:
    return _eager("eager", UNCHANGED, copy.deepcopy(subject.model), "NCHW")


def eager_channels_last(subject: Subject) -> Peer:
    return _eager("eager_channels_last", UNCHANGED, copy.deepcopy(subject.model), "channels_last")


def eager_linear(subject: Subject) -> Peer:
    return _eager("eager_linear", REWRITTEN, token_form(subject.model), "channels_last")


def _compiled(model: nn.Module, layout: str, x: Tensor) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` with its fastest settings for fixed weights and one shape, already compiled."""
    model = copy.deepcopy(model).to(memory_format=LAYOUTS[layout])
    compiled = torch.compile(model, mode="max-autotune", dynamic=False, fullgraph=True)
    # The tracer looks at this setting too; an option of torch.compile would not reach it.
    with torch._inductor.config.patch(freezing=True), torch.inference_mode(), quiet():
        compiled(x.contiguous(memory_format=LAYOUTS[layout]))
    return compiled


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block the autotuner prints no tables; it would print one per product to standard error."""
    from torch._inductor import select_algorithm

    before = select_algorithm.PRINT_AUTOTUNE
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        with torch._inductor.config.patch(max_autotune_report_choices_stats=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = before


def _attempt(model: nn.Module, layout: str, x: Tensor) -> Callable[[Tensor], Tensor] | str:
    """The compiled model, or why there is none."""
    try:
        return _compiled(model, layout, x)
    except Exception as error:
        return describe(error)


def _compile(name: str, form: str, model: nn.Module, x: Tensor) -> Peer:
    """Compiled in both layouts; the faster one stays. If one fails, its error is in the detail."""
    attempts = {layout: _attempt(model, layout, x) for layout in LAYOUTS}
    failed = {layout: found for layout, found in attempts.items() if isinstance(found, str)}
    candidates = {
        layout: Peer(name, form, found, LAYOUTS[layout], "")
        for layout, found in attempts.items()
        if not isinstance(found, str)
    }
    if not candidates:
        raise RuntimeError("; ".join(f"{layout}: {reason}" for layout, reason in failed.items()))
    with torch.inference_mode():
        times = interleave({layout: peer.on(x) for layout, peer in candidates.items()}, 1.0, min_rounds=3)
    best = min(times, key=lambda layout: times[layout].median)
    others = [f"{1e3 * times[layout].median:.3g} ms {layout}" for layout in times if layout != best]
    others += [f"{layout} failed: {reason}" for layout, reason in failed.items()]
    chosen = f"{best} (chosen at {1e3 * times[best].median:.3g} ms; {', '.join(others)})"
    detail = f"torch.compile max-autotune, freezing, {chosen}"
    return Peer(name, form, candidates[best].run, LAYOUTS[best], detail)


def compile_(subject: Subject) -> Peer:
    return _compile("compile", UNCHANGED, subject.model, subject.x)


def compile_linear(subject: Subject) -> Peer:
    return _compile("compile_linear", REWRITTEN, token_form(subject.model), subject.x)
