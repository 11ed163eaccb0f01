"""One forward pass of a patched backbone: its program run by the ops of a backend.

Where a part has a reason not to be fused, the pass runs the original module instead, hooks and all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from .backends import Backend
from .block_kind import BlockKind, first_half
from .dtypes import token_dtype
from .errors import InputError
from .modules import Backbone
from .network import watched
from .ops._library import memory_format_of
from .patch_state import PatchState
from .plan import BackbonePlan, BlockPlan, EmbedPlan, HeadPlan, NormPlan, StagePlan
from .program import Program, TracedProgram

Context: TypeAlias = Callable[[], contextlib.AbstractContextManager[Any]]


def _check(x: Any, lead: torch.Tensor, plan: BackbonePlan, autocast: bool) -> None:
    """Raise InputError unless ``x`` is a batch of images that the original would take too.

    Args:
        lead: the stem's weight, whose dtype and device the images have to have.
        autocast: whether autocast is on; then other floating dtypes are taken as well.
    """
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


class ForwardPass:
    """One forward pass. Each method runs one part of the plan on ``tokens`` and leaves its result there.

    Attributes:
        tokens: what the part before has written, [B, C, H, W].
        moments: their moments, or None when the part before has left none.
        owned: whether this pass alone holds ``tokens`` and ``moments``; only then may a block write over them.
    """

    def __init__(
        self,
        backbone: Backbone,
        program: Program | TracedProgram,
        backend: Backend,
        dtype: torch.dtype,
        outer: Context,
    ) -> None:
        """
        Args:
            dtype: of the tokens, or int8 for blocks whose products are int8.
            outer: the autocast that original modules run in.
        """
        self.backbone = backbone
        self.program = program
        self.ops = backend.ops
        self.dtype = token_dtype(dtype)
        self.int8 = dtype == torch.int8
        self.outer = outer
        self.traced = program if isinstance(program, TracedProgram) else None
        self.tokens: torch.Tensor
        self.moments: torch.Tensor | None = None
        self.owned = False

    def module(self, module: nn.Module, x: torch.Tensor) -> None:
        """Run an original module on ``x``. A hook may keep what it saw or returned, so the tokens are not owned."""
        with self.outer():
            out = module(x.to(self.program.lead().dtype))
        self.tokens = _dense(out.to(self.dtype))
        self.moments, self.owned = None, False

    def embed(self, plan: EmbedPlan, module: nn.Module, x: torch.Tensor, moments: bool) -> None:
        """The stem on the images, or a downsampling on the tokens; ``moments``: whether the next part needs them."""
        if plan.reason is not None:
            self.module(module, x)
            return
        weight, bias = self.program.weight_and_bias(plan.name)
        self.tokens, found = self.ops["embed"](x, weight, bias, plan.stride, plan.padding, self.dtype, moments)
        self.moments, self.owned = found if moments else None, True

    def moments_of_tokens(self) -> torch.Tensor:
        """The moments of the tokens, computed by a pass over them if no kernel has left them."""
        if self.moments is None:
            self.moments = self.ops["moments"](self.tokens)
        return self.moments

    def first_half(self, kind: BlockKind, module: nn.Module) -> None:
        """Run a block's own modules up to y, for a kind whose first half the op does not compute."""
        with self.outer():
            y = first_half(kind, module, self.tokens.to(self.program.lead().dtype))
        self.tokens = _dense(y.to(self.dtype))
        self.moments, self.owned = None, True

    def block(self, plan: BlockPlan, module: nn.Module, index: int, position: int) -> None:
        """Block ``position`` of the stage at ``index`` of the network."""
        traced = self.traced
        if plan.reason is not None or (traced is not None and traced.dropping(index, position, plan)):
            self.module(module, self.tokens)
            return
        kind = plan.kind
        assert kind is not None, "a block of no known kind has a reason"
        if not kind.fuses_first_half:
            self.first_half(kind, module)
        parameters = self.program.block(index, position, plan)
        if self.int8:
            parameters = [*parameters[:-1], True]
        moments = None if plan.per_position else self.moments_of_tokens()
        if self.owned and traced is None:
            # No backward can have saved tokens that this pass alone holds. Below the ADInplaceOrView key the write is
            # not counted for one, which saves 4 us per block.
            with torch._C._AutoDispatchBelowADInplaceOrView():
                self.ops["block_"](self.tokens, moments, *parameters)
            self.moments = moments
        else:
            self.tokens, found = self.ops["block"](self.tokens, moments, *parameters)
            self.moments, self.owned = None if plan.per_position else found, True

    def norm(self, plan: NormPlan, dtype: torch.dtype) -> torch.Tensor:
        """The normed tokens in ``dtype``, to be returned. The tokens themselves stay as they are."""
        if plan.reason is not None:
            module = getattr(self.backbone, plan.name)
            with self.outer():
                out = module(self.tokens.to(self.program.lead().dtype))
            self.owned = False
            return out.to(dtype)
        weight, bias = self.program.weight_and_bias(plan.name)
        moments = None if plan.per_position else self.moments_of_tokens()
        return self.ops["norm"](self.tokens, moments, weight, bias, plan.eps, plan.per_position, dtype)

    def head(self, plan: HeadPlan, norm: NormPlan, dtype: torch.dtype) -> torch.Tensor:
        """The logits; the last norm is part of the op."""
        scale, shift = self.program.weight_and_bias(norm.name)
        weight, bias = self.program.weight_and_bias(plan.name)
        moments = None if norm.per_position else self.moments_of_tokens()
        return self.ops["head"](self.tokens, moments, scale, shift, norm.eps, weight, bias, norm.per_position, dtype)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself when it is contiguous in one of the two memory formats, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _needs_moments(plan: BackbonePlan, index: int) -> bool:
    """Whether the embedding before position ``index`` of the network has to return the moments of its tokens.

    It has to when their first reader is fused and normalises over the whole image. That reader is the norm of a
    returned feature map where there is one, else the first block of the stage at ``index``. A block whose own modules
    compute its first half changes the tokens before the op reads them, so it needs none.
    """
    norms = {norm.index: norm for norm in plan.norms}
    if index - 1 in norms:
        return norms[index - 1].reason is None and not norms[index - 1].per_position
    stage = plan.network[index] if index < len(plan.network) else None
    if isinstance(stage, StagePlan) and stage.blocks:
        first = stage.blocks[0]
        op_reads = first.kind is not None and first.kind.fuses_first_half
        return stage.reason is None and first.reason is None and not first.per_position and op_reads
    return False


def run(backbone: Backbone, program: Program | TracedProgram, state: PatchState, x: torch.Tensor) -> Any:
    """The whole network, without gradients: what the original forward returns, computed by the backend's ops.

    The tokens are in ``state.compute_dtype``, else in autocast's dtype, else in the parameters'. Results have the
    dtypes that the original returns (measured): features that of the norm (under CPU autocast the parameters', under
    CUDA autocast float32), logits that of autocast, else the parameters'.
    """
    plan, lead = program.plan, program.lead()
    kind = lead.device.type
    autocast = torch.is_autocast_enabled(kind)
    _check(x, lead, plan, autocast)
    if not autocast:
        dtype = state.compute_dtype or lead.dtype
        backend = state.backend_for(lead.device, dtype)
        done = _whole(program, backend, x, dtype, lead.dtype, lead.dtype)
        if done is not None:
            return done
        forward = ForwardPass(backbone, program, backend, dtype, contextlib.nullcontext)
        return _steps(forward, plan, x, lead.dtype, lead.dtype)
    logits_dtype = torch.get_autocast_dtype(kind)
    features_dtype = torch.float32 if kind == "cuda" else lead.dtype
    dtype = state.compute_dtype or logits_dtype
    backend = state.backend_for(lead.device, dtype)
    outer = lambda: torch.autocast(kind, dtype=logits_dtype)  # noqa: E731
    with torch.autocast(kind, enabled=False):
        done = _whole(program, backend, x, dtype, features_dtype, logits_dtype)
        if done is not None:
            return done
        forward = ForwardPass(backbone, program, backend, dtype, outer)
        return _steps(forward, plan, x, features_dtype, logits_dtype)


def _whole(
    program: Program | TracedProgram,
    backend: Backend,
    x: torch.Tensor,
    dtype: torch.dtype,
    features_dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> Any:
    """What the forward returns, computed by the backend in one call; None where it has to be computed by the parts."""
    # An int8 block quantises its weights in each call. Part by part, all images of a batch share that.
    if backend.prepare is None or dtype == torch.int8 or isinstance(program, TracedProgram):
        return None
    if x.shape[0] == 0 or watched(x):
        return None
    prepared = program.network.prepared(backend.prepare)
    if prepared is None:
        return None
    x = _dense(x)
    results = prepared.run(x, dtype, features_dtype, logits_dtype)
    if program.plan.head is not None:
        return results[0]
    layout = memory_format_of(x)
    return tuple(result.contiguous(memory_format=layout) for result in results)


def _steps(
    forward: ForwardPass, plan: BackbonePlan, x: torch.Tensor, features_dtype: torch.dtype, logits_dtype: torch.dtype
) -> Any:
    """The parts of the plan in turn."""
    backbone = forward.backbone
    norms = {norm.index: norm for norm in plan.norms}
    fused_head = plan.head if plan.head is not None and plan.head.reason is None else None
    features = []
    x = _dense(x)
    layout = memory_format_of(x)
    forward.embed(plan.stem, backbone.patch_embed, x, _needs_moments(plan, 0))
    for index, item in enumerate(plan.network):
        module = backbone.network[index]
        if not isinstance(item, StagePlan):
            forward.embed(item, module, forward.tokens, _needs_moments(plan, index + 1))
        elif item.reason is not None:
            forward.module(module, forward.tokens)
        else:
            for position, block in enumerate(item.blocks):
                forward.block(block, module[position], index, position)
        # With a fused head nobody sees the features, except that a hook on one of the norms does.
        if index in norms and (fused_head is None or norms[index].reason is not None):
            # The layout of the tokens is the backend's affair, that of the results is the input's.
            features.append(forward.norm(norms[index], features_dtype).contiguous(memory_format=layout))
    if fused_head is not None:
        return forward.head(fused_head, norms[len(plan.network) - 1], logits_dtype)
    if plan.head is None:
        return tuple(features)
    with forward.outer():
        return backbone.head(tuple(features))
