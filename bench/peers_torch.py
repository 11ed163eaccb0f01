"""The peers that are PyTorch: ours, eager in both layouts, torch.compile, each on both forms of the model."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from subject import LAYOUTS, NCHW, REWRITTEN, UNCHANGED, Peer, Subject
from token_form import token_form
from torch import Tensor, nn
from worker import describe

import riformer_kernels
from riformer_kernels.dtypes import name_of
from riformer_kernels.timing import interleave

OURS = "ours"


def ours(subject: Subject, compute_dtype: torch.dtype | None = None, name: str = OURS) -> Peer:
    """The patched model; verification by `patch` itself included."""
    model = copy.deepcopy(subject.model)
    handle = riformer_kernels.patch(model, compute_dtype=compute_dtype)
    served = ", ".join(dict.fromkeys(row.backend for row in handle.report if row.backend))
    within = f", {name_of(compute_dtype)} inside a {name_of(subject.x.dtype)} model" if compute_dtype else ""
    return Peer(name, UNCHANGED, model, NCHW, served + within)


def _eager(name: str, form: str, model: nn.Module, layout: str) -> Peer:
    return Peer(name, form, model.to(memory_format=LAYOUTS[layout]), LAYOUTS[layout], f"PyTorch eager, {layout}")


def eager(subject: Subject) -> Peer:
    return _eager("eager", UNCHANGED, copy.deepcopy(subject.model), "NCHW")


def eager_channels_last(subject: Subject) -> Peer:
    return _eager("eager_channels_last", UNCHANGED, copy.deepcopy(subject.model), "channels_last")


def eager_linear(subject: Subject) -> Peer:
    return _eager("eager_linear", REWRITTEN, token_form(subject.model), "channels_last")


def compiled(model: nn.Module, layout: str, x: Tensor) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` with its fastest settings for fixed weights and one shape, already compiled."""
    model = copy.deepcopy(model).to(memory_format=LAYOUTS[layout])
    made = torch.compile(model, mode="max-autotune", dynamic=False, fullgraph=True)
    # The tracer looks at this setting too; an option of torch.compile would not reach it.
    with torch._inductor.config.patch(freezing=True), torch.inference_mode(), quiet():
        made(x.contiguous(memory_format=LAYOUTS[layout]))
    return made


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


def _attempt(make: Callable[[], Peer]) -> Peer | str:
    """The peer, or why there is none."""
    try:
        return make()
    except Exception as error:
        return describe(error)


def fastest(attempts: Mapping[str, Callable[[], Peer]], x: Tensor) -> Peer:
    """The fastest of several ways to run the same peer. What the others took, or why one failed, is in its detail.

    Raises:
        RuntimeError: all of them failed.
    """
    attempted = {label: _attempt(make) for label, make in attempts.items()}
    made = {label: found for label, found in attempted.items() if isinstance(found, Peer)}
    failed = {label: found for label, found in attempted.items() if isinstance(found, str)}
    if not made:
        raise RuntimeError("; ".join(f"{label}: {reason}" for label, reason in failed.items()))
    with torch.inference_mode():
        times = interleave({label: peer.on(x) for label, peer in made.items()}, 1.0, min_rounds=3)
    best = min(times, key=lambda label: times[label].median)
    others = [f"{1e3 * times[label].median:.3g} ms {label}" for label in times if label != best]
    others += [f"{label} failed: {reason}" for label, reason in failed.items()]
    chosen = f"{best} (chosen at {'; '.join([f'{1e3 * times[best].median:.3g} ms', *others])})"
    return replace(made[best], detail=f"{made[best].detail}, {chosen}")


def _compile(name: str, form: str, model: nn.Module, x: Tensor) -> Peer:
    """Compiled in both layouts; the faster one stays."""

    def make(layout: str) -> Peer:
        detail = "torch.compile max-autotune, freezing"
        return Peer(name, form, compiled(model, layout, x), LAYOUTS[layout], detail)

    return fastest({layout: functools.partial(make, layout) for layout in LAYOUTS}, x)


def compile_(subject: Subject) -> Peer:
    return _compile("compile", UNCHANGED, subject.model, subject.x)


def compile_linear(subject: Subject) -> Peer:
    return _compile("compile_linear", REWRITTEN, token_form(subject.model), subject.x)
