"""The peers: other ways to run the same model, each with its availability, and the model that they run.

A peer is a factory in ``FACTORIES``; a new one (another runtime, another device) is one more function. A factory gets
the ``Subject`` and returns a ``Peer``; what it raises becomes the peer's reason. The patched model is built the same
way, under the name "ours".

Peers run under ``torch.inference_mode`` on an input that is already in their dtype and layout.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import riformer
import torch
import torch.nn.functional as F
from harness import interleave
from torch import Tensor, nn

import riformer_kernels
from riformer_kernels import numerics

OURS = "ours"
NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = {"NCHW": NCHW, "channels_last": CHANNELS_LAST}
UNCHANGED, REWRITTEN = "unchanged", "rewritten"
EQUAL = 1e-11  # float64, relative to the largest logit: what two orders of summation differ by is 1e-15


@dataclass(frozen=True)
class Subject:
    """What is run: a deployed classifier in evaluation mode in the tested dtype, and an NCHW batch for it."""

    model: riformer.RIFormer
    x: Tensor


@dataclass(frozen=True)
class Peer:
    """One way to run the subject.

    Attributes:
        name: as in the results.
        form: "unchanged" for the model as users have it, "rewritten" for one that a user would first rewrite by hand.
        run: images (in ``layout``) to logits; None when there is none.
        layout: memory format that ``run`` wants.
        detail: what exactly this is.
        reason: why there is no ``run``, else None.
    """

    name: str
    form: str
    run: Callable[[Tensor], Tensor] | None
    layout: torch.memory_format
    detail: str
    reason: str | None = None

    def on(self, x: Tensor) -> Callable[[], Tensor]:
        """A call on ``x``, which is laid out here, once."""
        assert self.run is not None, self.reason
        run, laid_out = self.run, x.contiguous(memory_format=self.layout)
        return lambda: run(laid_out)


# ------------------------------------------------------------------------------------------------ models and inputs


def random_model(arch: riformer.arch.ArchLike, dtype: torch.dtype = torch.float32, seed: int = 0) -> riformer.RIFormer:
    """A deployed classifier with hard random parameters, rounded to ``dtype``, in evaluation mode."""
    model = riformer.RIFormer(arch, num_classes=1000, deploy=True)
    return riformer.randomize_(model, seed).to(dtype).eval()


def random_images(batch: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 3, size, size), generator=generator).to(dtype)


# -------------------------------------------------------------------------------------------------- rewritten model


class _TokenBlock(nn.Module):
    """A deployed block with its 1x1 convolutions as ``F.linear`` over tokens; parameters are the block's own."""

    def __init__(self, block: riformer.RIFormerBlock) -> None:
        super().__init__()
        if not isinstance(block.norm2, nn.GroupNorm) or not block.deploy:
            raise ValueError("expected a deployed block with GroupNorm; call switch_to_deploy() first")
        self.norm1, self.norm2 = block.norm_reparam, block.norm2
        self.scale_1, self.scale_2 = block.layer_scale_1, block.layer_scale_2
        self.fc1, self.fc2 = block.mlp.fc1, block.mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        x = x + self.scale_1[:, None, None] * self.norm1(x)
        tokens = self.norm2(x).permute(0, 2, 3, 1)
        hidden = F.gelu(F.linear(tokens, self.fc1.weight.flatten(1), self.fc1.bias))
        out = F.linear(hidden, self.fc2.weight.flatten(1), self.fc2.bias)
        return x + (self.scale_2 * out).permute(0, 3, 1, 2)


class TokenForm(nn.Module):
    """A deployed RIFormer classifier with every 1x1 convolution rewritten as ``F.linear`` over tokens.

    What a user who knows that linear layers compile better than convolutions would write by hand: measured, it makes
    torch.compile up to 1.4 times as fast. It shares the model's parameters and computes the same function.
    """

    def __init__(self, model: riformer.RIFormer) -> None:
        super().__init__()
        self.stem = model.patch_embed.proj
        self.steps = nn.Sequential(*(
            nn.Sequential(*map(_TokenBlock, step)) if isinstance(step, nn.Sequential) else step.proj
            for step in model.network
        ))  # fmt: skip
        self.norm = getattr(model, f"norm{len(model.network) - 1}")
        self.fc = model.head.fc

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to logits."""
        return self.fc(self.norm(self.steps(self.stem(x))).mean((-2, -1)))


@torch.no_grad()
def token_form(model: riformer.RIFormer) -> TokenForm:
    """The rewritten form of ``model``, asserted equal to it in float64."""
    plain = copy.deepcopy(model).double()
    x = random_images(2, 64, torch.float64, seed=1)
    expected, found = plain(x), TokenForm(plain).eval()(x)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error < EQUAL, f"the rewritten model differs from the model by {error:.1e} of its largest logit"
    return TokenForm(copy.deepcopy(model)).eval()


# -------------------------------------------------------------------------------------------------------- factories


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
    """``torch.compile`` at its strongest for fixed weights and one shape; compiled when this returns."""
    model = copy.deepcopy(model).to(memory_format=LAYOUTS[layout])
    compiled = torch.compile(model, mode="max-autotune", dynamic=False, fullgraph=True)
    # Freezing is asked for by the tracer too, which an option of the call would not reach.
    with torch._inductor.config.patch(freezing=True), torch.inference_mode(), _quiet():
        compiled(x.contiguous(memory_format=LAYOUTS[layout]))
    return compiled


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the autotuner's tables, of which there is one per product, on standard error."""
    from torch._inductor import select_algorithm

    before = select_algorithm.PRINT_AUTOTUNE
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        with torch._inductor.config.patch(max_autotune_report_choices_stats=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = before


def _compile(name: str, form: str, model: nn.Module, x: Tensor) -> Peer:
    """Compiled in both layouts; the faster one stays. Should one fail, its error is in the detail."""
    candidates, failed = {}, {}
    for layout in LAYOUTS:
        try:
            run = _compiled(model, layout, x)
        except Exception as error:
            failed[layout] = describe(error)
        else:
            candidates[layout] = Peer(name, form, run, LAYOUTS[layout], "")
    if not candidates:
        raise RuntimeError("; ".join(f"{layout}: {reason}" for layout, reason in failed.items()))
    with torch.inference_mode():
        times = interleave({layout: peer.on(x) for layout, peer in candidates.items()}, 1.0, min_rounds=3)
    best = min(times, key=lambda layout: times[layout].median)
    others = [f"{1e3 * times[layout].median:.3g} ms {layout}" for layout in times if layout != best]
    others += [f"{layout} failed: {reason}" for layout, reason in failed.items()]
    detail = f"torch.compile max-autotune, freezing, {best} (chosen at {1e3 * times[best].median:.3g} ms; {', '.join(others)})"
    return Peer(name, form, candidates[best].run, LAYOUTS[best], detail)


def compile_(subject: Subject) -> Peer:
    return _compile("compile", UNCHANGED, subject.model, subject.x)


def compile_linear(subject: Subject) -> Peer:
    return _compile("compile_linear", REWRITTEN, token_form(subject.model), subject.x)


FACTORIES: dict[str, tuple[str, Callable[[Subject], Peer]]] = {
    OURS: (UNCHANGED, ours),
    "eager": (UNCHANGED, eager),
    "eager_channels_last": (UNCHANGED, eager_channels_last),
    "eager_linear": (REWRITTEN, eager_linear),
    "compile": (UNCHANGED, compile_),
    "compile_linear": (REWRITTEN, compile_linear),
}
COMPILED = ("compile", "compile_linear")


def names(compiled: bool = True) -> list[str]:
    """All of them, or those that need no compiler; ours first."""
    return [name for name in FACTORIES if compiled or name not in COMPILED]


def build(name: str, subject: Subject) -> Peer:
    """The peer, called once on the subject's batch; one that fails has a reason in place of ``run``.

    Only ours may raise: a failure of the thing measured is no measurement.
    """
    form, factory = FACTORIES[name]
    try:
        peer = factory(subject)
        with torch.inference_mode():
            peer.on(subject.x)()
    except Exception as error:
        if name == OURS:
            raise
        return Peer(name, form, None, NCHW, "", describe(error))
    return peer


def forget_compiled() -> None:
    """Drop what torch.compile keeps: after a few shapes and dtypes of one class it would refuse to compile more."""
    torch._dynamo.reset()


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ----------------------------------------------------------------------------------------------------------- errors

CHECKED = 4


class Judge:
    """Error figures of every peer on the same images, against float64 and eager PyTorch (the error-ratio rule).

    At least ``CHECKED`` images: those of one alone scatter. A peer with a fixed batch is called on several batches.
    """

    def __init__(self, subject: Subject) -> None:
        batch, *_, size = subject.x.shape
        calls = -(-CHECKED // batch)
        x = random_images(batch * calls, size, subject.x.dtype, seed=2)
        self.inputs = list(x.split(batch))
        self.kept = CHECKED
        with torch.inference_mode():
            self.golden = copy.deepcopy(subject.model).double()(x[: self.kept].double())
            self.eager = self._output(subject.model)

    def _output(self, run: Callable[[Tensor], Tensor], layout: torch.memory_format = NCHW) -> Tensor:
        outputs = [run(x.contiguous(memory_format=layout)).clone() for x in self.inputs]
        return torch.cat(outputs)[: self.kept]

    @torch.inference_mode()
    def ratios(self, peer: Peer) -> numerics.ErrorRatios:
        """Raises AssertionError when ours breaks the rule; a peer's figures are only reported."""
        assert peer.run is not None, peer.reason
        found = numerics.compare(self._output(peer.run, peer.layout), self.eager, self.golden)
        assert found.passed or peer.name != OURS, f"the patched model is not accurate enough: {found.exceeded}"
        return found


# ----------------------------------------------------------------------------------------------------------- memory


def memory_subject(arch: Any, size: int, dtype: str, name: str) -> Callable[[int], Callable[[], object]]:
    """What `harness.peak_memory` runs in its own process: ``prepare(batch)`` for the peer ``name``."""
    kind = getattr(torch, dtype)
    peer = FACTORIES[name][1](Subject(random_model(arch, kind), random_images(1, size, kind)))
    return lambda batch: peer.on(random_images(batch, size, kind))


MEASURED = (OURS, "eager", "eager_channels_last")
"""Peers whose memory is measured. torch.compile's first call at a batch compiles, which is not what a call needs."""
