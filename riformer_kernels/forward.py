"""One forward pass over a plan: which op runs on what, in which dtype, and what is left to the original modules."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import nn

from . import backends
from .errors import InputError
from .ops._library import memory_format_of
from .program import Program, TracedProgram
from .recognise import BackbonePlan, StagePlan


class Options(Protocol):
    """What ``run`` asks of a patched module's configuration."""

    compute_dtype: torch.dtype | None

    def serving(self, device: torch.device, dtype: torch.dtype) -> backends.Backend: ...


def _check(x: Any, lead: torch.Tensor, plan: BackbonePlan, autocast: bool) -> None:
    """Raise InputError unless ``x`` is a batch of images that the original would take too."""
    stem = plan.stem
    channels = stem.in_channels or lead.shape[1]
    want = f"images [B, {channels}, H, W] in {lead.dtype} on {lead.device}"
    if not isinstance(x, torch.Tensor):
        raise InputError(f"expected {want} as a torch.Tensor, found {type(x).__name__}; use torch.as_tensor(images)")
    if x.ndim != 4:
        hint = "; add the batch dimension with images.unsqueeze(0)" if x.ndim == 3 else ""
        raise InputError(f"expected {want}, found {x.ndim} dimensions, shape {tuple(x.shape)}{hint}")
    if x.shape[1] != channels:
        hint = "; for [B, H, W, C] use images.permute(0, 3, 1, 2)" if x.shape[3] == channels else ""
        raise InputError(f"expected {want}, found {x.shape[1]} channels, shape {tuple(x.shape)}{hint}")
    if not x.is_floating_point():
        raise InputError(f"expected {want}, found {x.dtype}; convert and normalise: (images.float() - mean) / std")
    if x.device != lead.device:
        raise InputError(f"expected {want}, found images on {x.device}; use images.to({str(lead.device)!r})")
    if x.dtype != lead.dtype and not autocast:
        raise InputError(
            f"expected {want}, found {x.dtype}; use images.to({lead.dtype}), model.to({x.dtype}) or autocast"
        )
    height, width = x.shape[2], x.shape[3]
    for item in (stem, *plan.network):
        if not isinstance(item, StagePlan) and item.stride:
            height = (height + 2 * item.padding - item.kernel[0]) // item.stride + 1
            width = (width + 2 * item.padding - item.kernel[1]) // item.stride + 1
            if height < 1 or width < 1:
                raise InputError(
                    f"expected {want} large enough for {item.name}'s {item.kernel[0]}x{item.kernel[1]} window, found "
                    f"H, W = {x.shape[2]}, {x.shape[3]}; resize the images"
                )


class _Run:
    """One forward pass. ``tokens`` and ``moments`` move from step to step; ``owned``: nobody else holds the tokens."""

    def __init__(
        self, backbone: nn.Module, program: Any, backend: Any, dtype: torch.dtype, outer: Any, tracing: bool
    ) -> None:
        self.backbone = backbone
        self.program = program
        self.backend = backend
        self.dtype = dtype
        self.outer = outer
        self.tracing = tracing
        self.tokens: torch.Tensor = None
        self.moments: torch.Tensor | None = None
        self.owned = False

    def module(self, module: nn.Module, x: torch.Tensor) -> None:
        """Run an original module on ``x``, hooks and all. What it saw or returned may be kept by a hook."""
        with self.outer() if self.outer else contextlib.nullcontext():
            out = module(x.to(self.program.lead().dtype))
        self.tokens = _dense(out.to(self.dtype))
        self.moments, self.owned = None, False

    def embed(self, plan: Any, module: nn.Module, x: torch.Tensor, moments: bool) -> None:
        if plan.reason is not None:
            self.module(module, x)
            return
        weight, bias = self.program.pair(plan.name)
        self.tokens, found = self.backend.embed(x, weight, bias, plan.stride, plan.padding, self.dtype, moments)
        self.moments, self.owned = found if moments else None, True

    def needed(self) -> torch.Tensor:
        """The moments of the tokens, computed by a pass over them if no kernel delivered them."""
        if self.moments is None:
            self.moments = self.backend.moments(self.tokens)
        return self.moments

    def block(self, plan: Any, module: nn.Module, index: int, position: int) -> None:
        if plan.reason is not None or (self.tracing and self.program.dropping(index, position)):
            self.module(module, self.tokens)
            return
        arguments = self.program.block(index, position, plan)
        moments = None if plan.per_position else self.needed()
        if self.owned and not self.tracing:
            # Nobody else has seen these tokens: there is no backward to warn by counting the write (4 us, twelve times).
            with torch._C._AutoDispatchBelowADInplaceOrView():
                self.backend.block_(self.tokens, moments, *arguments)
            self.moments = moments
        else:
            self.tokens, found = self.backend.block(self.tokens, moments, *arguments)
            self.moments, self.owned = None if plan.per_position else found, True

    def norm(self, plan: Any, dtype: torch.dtype) -> torch.Tensor:
        if plan.reason is not None:
            module = getattr(self.backbone, plan.name)
            with self.outer() if self.outer else contextlib.nullcontext():
                out = module(self.tokens.to(self.program.lead().dtype))
            self.owned = False
            return out.to(dtype)
        weight, bias = self.program.pair(plan.name)
        moments = None if plan.per_position else self.needed()
        return self.backend.norm(self.tokens, moments, weight, bias, plan.eps, plan.per_position, dtype)

    def head(self, plan: Any, norm: Any, dtype: torch.dtype) -> torch.Tensor:
        scale, shift = self.program.pair(norm.name)
        weight, bias = self.program.pair(plan.name)
        moments = None if norm.per_position else self.needed()
        return self.backend.head(self.tokens, moments, scale, shift, norm.eps, weight, bias, norm.per_position, dtype)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself when it is contiguous in one of the two memory formats, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _wants_moments(plan: BackbonePlan, index: int) -> bool:
    """Whether the first reader of what position ``index - 1`` writes is fused and normalises over the whole image."""
    norms = {norm.index: norm for norm in plan.norms}
    if index - 1 in norms:
        return norms[index - 1].reason is None and not norms[index - 1].per_position
    if index < len(plan.network) and isinstance(plan.network[index], StagePlan) and plan.network[index].blocks:
        stage = plan.network[index]
        return stage.reason is None and stage.blocks[0].reason is None and not stage.blocks[0].per_position
    return False


def run(
    backbone: nn.Module, program: Program | TracedProgram, config: Options, x: torch.Tensor, tracing: bool = False
) -> Any:
    """The whole network, without gradients: what the original forward returns, computed by the backend's ops.

    Dtypes: tokens in ``config.compute_dtype``, else autocast's, else the parameters'. Results as the original returns
    them, measured: features in the norm's dtype (under CPU autocast the parameters', under CUDA autocast float32),
    logits in autocast's dtype, else the parameters'.
    """
    plan, lead = program.plan, program.lead()
    kind = lead.device.type
    autocast = torch.is_autocast_enabled(kind)
    _check(x, lead, plan, autocast)
    features_dtype = logits_dtype = lead.dtype
    outer = None
    if autocast:
        logits_dtype = torch.get_autocast_dtype(kind)
        features_dtype = torch.float32 if kind == "cuda" else lead.dtype
        inner_dtype = logits_dtype
        outer = lambda: torch.autocast(kind, dtype=inner_dtype)  # noqa: E731
    dtype = config.compute_dtype or logits_dtype
    backend = config.serving(lead.device, dtype)
    state = _Run(backbone, program, backend, dtype, outer, tracing)
    if autocast:
        with torch.autocast(kind, enabled=False):
            return _steps(state, plan, x, features_dtype, logits_dtype)
    return _steps(state, plan, x, features_dtype, logits_dtype)


def _steps(
    state: _Run, plan: BackbonePlan, x: torch.Tensor, features_dtype: torch.dtype, logits_dtype: torch.dtype
) -> Any:
    backbone = state.backbone
    norms = {norm.index: norm for norm in plan.norms}
    pooled = plan.head is not None and plan.head.reason is None
    features = []
    x = _dense(x)
    layout = memory_format_of(x)
    state.embed(plan.stem, backbone.patch_embed, x, _wants_moments(plan, 0))
    for index, item in enumerate(plan.network):
        module = backbone.network[index]
        if not isinstance(item, StagePlan):
            state.embed(item, module, state.tokens, _wants_moments(plan, index + 1))
        elif item.reason is not None:
            state.module(module, state.tokens)
        else:
            for position, block in enumerate(item.blocks):
                state.block(block, module[position], index, position)
        # With a fused head nobody sees the features, except that a hook on one of the norms does.
        if index in norms and (not pooled or norms[index].reason is not None):
            # The layout of the tokens is the backend's affair, that of the results is the input's.
            features.append(state.norm(norms[index], features_dtype).contiguous(memory_format=layout))
    if pooled:
        return state.head(plan.head, norms[len(plan.network) - 1], logits_dtype)
    if plan.head is None:
        return tuple(features)
    with state.outer() if state.outer else contextlib.nullcontext():
        return backbone.head(tuple(features))
