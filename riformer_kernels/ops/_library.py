"""How an op is registered: schema, fake, plain-PyTorch reference, gradient.

An op is defined once and registered in several namespaces, as one dispatch key of one namespace has room for one
kernel: ``riformer`` has the CPU's and Triton's, ``riformer_cuda`` those in CUDA C++. The schemas live in Python so that
they exist without a compiler; a native library adds its kernels for its own dispatch key. An op without a kernel on a
device fails there with PyTorch's own "not implemented for this backend" error, as the reference is never a silent
substitute. Whoever wants the reference asks for it by name (``backend="reference"``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError

NAMESPACE = "riformer"
CUDA_NAMESPACE = "riformer_cuda"
LIBRARIES: dict[str, torch.library.Library] = {}


@dataclass(frozen=True)
class Op:
    """One op of the engine.

    Attributes:
        name: name in its namespaces, such as ``torch.ops.riformer``.
        schema: arguments and returns, as ``torch.library`` writes them.
        reference: plain PyTorch; differentiable, any device, any floating dtype including float64.
        fake: shapes, dtypes and strides of the outputs.
        in_place: whether it writes over its first two arguments; such an op has no gradient.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    in_place: bool = False

    @property
    def file(self) -> str:
        """Name of the files that hold the op, here and in a backend: ``block_`` shares those of ``block``."""
        return self.name.removesuffix("_")


def register(namespace: str, ops: Iterable[Op]) -> torch.library.Library:
    """Define ``ops`` in ``namespace``, each with its fake and its gradient; the library, for kernels to be added to.

    The gradient recomputes the op through ``reference`` and differentiates that: no activation is kept, and a
    result never silently loses the gradients that were due.
    """
    library = LIBRARIES[namespace] = torch.library.Library(namespace, "DEF")
    for op in ops:
        qualified = f"{namespace}::{op.name}"
        library.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, op.fake, lib=library)
        if op.in_place:
            _register_in_place(qualified, library)
        else:
            _register_recomputed_gradient(qualified, op.reference, library)
    return library


def overloads(namespace: str, names: Iterable[str]) -> dict[str, Any]:
    """The callables ``torch.ops.<namespace>.<name>.default``, by name."""
    return {name: getattr(getattr(torch.ops, namespace), name).default for name in names}


def _register_in_place(qualified: str, library: torch.library.Library) -> None:
    namespace, name = qualified.split("::")
    overload = overloads(namespace, [name])[name]

    def autograd(keys: torch.DispatchKeySet, *arguments: Any) -> None:
        """The op overwrites what its gradient would need, so it raises where a gradient is due."""
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            raise RuntimeError(
                f"{qualified} has no gradient, and an argument requires one; call {qualified.rstrip('_')}, or this one "
                "under torch.inference_mode() or torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    def version(keys: torch.DispatchKeySet, *arguments: Any) -> None:
        """Count the write, so that a backward that has saved ``x`` or ``moments`` notices."""
        for written in arguments[:2]:
            if written is not None:
                torch.autograd.graph.increment_version(written)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    library.impl(name, autograd, "Autograd", with_keyset=True)
    library.impl(name, version, "ADInplaceOrView", with_keyset=True)


def _register_recomputed_gradient(
    qualified: str, reference: Callable[..., Any], library: torch.library.Library
) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, torch.Tensor)))

    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        ]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed and ctx.is_tensor[index]]

        def recompute(*leaves: torch.Tensor) -> Any:
            arguments = list(inputs)
            for index, leaf in zip(wanted, leaves, strict=True):
                arguments[index] = leaf
            return reference(*arguments)

        outputs, pullback = torch.func.vjp(recompute, *(inputs[index] for index in wanted))[:2]
        if isinstance(outputs, torch.Tensor):
            cotangents: Any = _filled(grad_outputs[0], outputs)
        else:
            cotangents = tuple(_filled(grad, out) for grad, out in zip(grad_outputs, outputs, strict=True))
        gradients: list[torch.Tensor | None] = [None] * len(inputs)
        for index, gradient in zip(wanted, pullback(cotangents), strict=True):
            gradients[index] = gradient
        return tuple(gradients)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)


def _filled(grad: torch.Tensor | None, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output) if grad is None else grad.to(output.dtype)


def needed(moments: torch.Tensor | None) -> torch.Tensor:
    """The moments that GroupNorm with one group cannot do without."""
    if moments is None:
        raise InputError("GroupNorm with one group needs the moments of the tokens; only per_position does without")
    return moments


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
