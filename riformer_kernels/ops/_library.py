"""How an op is registered: schema, fake, plain-PyTorch reference, gradient.

The schemas live in Python so that they exist without a compiler; a native library adds its kernels for its own
dispatch key (``CPU``, ``CUDA``). An op without a native kernel on a device fails there with PyTorch's own
"not implemented for this backend" error: the reference is never a silent substitute. Whoever wants the reference asks
for it by name (``backend="reference"``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "riformer"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Op:
    """One op of the engine.

    Attributes:
        name: name in the ``torch.ops.riformer`` namespace.
        schema: arguments and returns, as ``torch.library`` writes them.
        reference: plain PyTorch; differentiable, any device, any floating dtype including float64.
        fake: shapes, dtypes and strides of the outputs.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]

    @property
    def overload(self) -> Any:
        """The callable ``torch.ops.riformer.<name>.default``."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


def register(
    name: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any], differentiable: bool = True
) -> Op:
    """Define ``riformer::name`` and register its fake and its gradient.

    The gradient recomputes the op through ``reference`` and differentiates that: no activation is kept, and a
    result never silently loses the gradients that were due.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if differentiable:
        _register_recomputed_gradient(qualified, reference)
    return Op(name, schema, reference, fake)


def _register_recomputed_gradient(qualified: str, reference: Callable[..., Any]) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, torch.Tensor)))

    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others)]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed and ctx.is_tensor[index]]

        def recompute(*leaves: torch.Tensor) -> Any:
            arguments = list(inputs)
            for index, leaf in zip(wanted, leaves):
                arguments[index] = leaf
            return reference(*arguments)

        outputs, pullback = torch.func.vjp(recompute, *(inputs[index] for index in wanted))
        if isinstance(outputs, torch.Tensor):
            cotangents: Any = _filled(grad_outputs[0], outputs)
        else:
            cotangents = tuple(_filled(grad, out) for grad, out in zip(grad_outputs, outputs))
        gradients: list[torch.Tensor | None] = [None] * len(inputs)
        for index, gradient in zip(wanted, pullback(cotangents)):
            gradients[index] = gradient
        return tuple(gradients)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)


def _filled(grad: torch.Tensor | None, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output) if grad is None else grad.to(output.dtype)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a reference computes in: float64 stays, everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """The layout of a result: the input's, where "contiguous in both" (a 1x1 image, one channel) counts as NCHW."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def token_format(device: torch.device) -> torch.memory_format:
    """The layout that ``embed`` writes tokens in: the CPU kernels keep the positions in the vector lanes, hence NCHW;
    elsewhere the channels are contiguous."""
    return torch.contiguous_format if device.type in ("cpu", "meta") else torch.channels_last
