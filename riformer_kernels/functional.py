"""The LN-1x1 unit of the RIFormer paper as one function, for other models."""

from __future__ import annotations

import torch

from . import backends, dtypes
from .errors import InputError
from .ops.block import BlockParameters
from .tracing import constant_while_tracing


def norm_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    norm: str = "group",
    eps: float = 1e-5,
    layer_scale: torch.Tensor | None = None,
    residual: bool = True,
    moments: torch.Tensor | None = None,
    return_moments: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``x + layer_scale * (W2 gelu(W1 norm(x) + b1) + b2)``, GELU exact (erf), in one pass over ``x``.

    The hidden tensor never reaches main memory. A new tensor is returned; ``x`` is not written to.

    Gradients: the function is an inference kernel with a correct, not a fast, backward. Where gradients are due, the
    backward recomputes the unit in plain PyTorch and differentiates that (first order only); nothing is kept but the
    inputs. Under ``torch.inference_mode()`` or ``torch.no_grad()`` there is no such cost.
    Autocast is ignored: the dtype of ``x`` decides.

    Args:
        x: tokens [B, C, H, W], contiguous or channels_last (anything else is copied once); float32, bfloat16 or
            float16. C must be a multiple of 8 for the native kernels. B may be 0.
        norm_weight, norm_bias: [C].
        fc1_weight, fc1_bias: [hidden, C] or [hidden, C, 1, 1]; [hidden] or None. hidden: a multiple of 8.
        fc2_weight, fc2_bias: [C, hidden] or [C, hidden, 1, 1]; [C] or None.
        norm: "group" for GroupNorm with one group (statistics over C, H and W of each image), "layer" for LayerNorm
            over the channels of each position.
        eps: the norm's epsilon.
        layer_scale: [C], or None for 1.
        residual: False leaves out ``x +``.
        moments: [B, 2, C] float32 of ``x``, as an earlier call returned them (norm="group" only). Saves the pass that
            computes them. They must be those of ``x``; this cannot be checked.
        return_moments: also return the moments of the result (norm="group" only), for the next unit.
        backend: "auto", "cpu", "triton", "cuda" or "reference".

    The parameters may be in any of the three dtypes, whatever ``x`` is in; arithmetic is float32 or better.

    Returns:
        A tensor like ``x`` (shape, dtype, memory format), and its moments [B, 2, C] with ``return_moments``.

    Raises:
        InputError: wrong rank, shape, dtype, device or norm name; the message names what was expected.
        BackendError: no backend serves this device and dtype.
    """
    if norm not in ("group", "layer"):
        raise InputError(f"norm must be 'group' (GroupNorm with one group) or 'layer' (per position), found {norm!r}")
    per_position = norm == "layer"
    if per_position and (moments is not None or return_moments):
        raise InputError("moments belong to norm='group'; LayerNorm per position neither needs nor makes any")
    _check(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, moments)
    chosen = backends.ALL[_choose(backend, x.device.type, x.dtype)]
    if x.shape[1] % chosen.multiple or fc1_weight.shape[0] % chosen.multiple:
        raise InputError(
            f"C={x.shape[1]} and hidden={fc1_weight.shape[0]}: the native kernels need multiples of {chosen.multiple}; "
            "use backend='reference' for plain PyTorch"
        )
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        if moments is None and not per_position:
            moments = chosen.ops["moments"](x)
        unit = BlockParameters(
            layer_scale_1=None, norm1_weight=None, norm1_bias=None, affine_weight=None, affine_bias=None, eps1=0.0,
            norm2_weight=norm_weight, norm2_bias=norm_bias, eps2=eps, fc1_weight=fc1_weight, fc1_bias=fc1_bias,
            fc2_weight=fc2_weight, fc2_bias=fc2_bias, layer_scale_2=layer_scale, per_position=per_position,
            residual=residual,
        )  # fmt: skip
        out, out_moments = chosen.ops["block"](x, moments, *unit)
    return (out, out_moments) if return_moments else out


@constant_while_tracing
def _choose(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend's name; while tracing, asked by Python and a constant in the graph."""
    return backends.choose(backend, torch.device(device), dtype).name


def _check(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    moments: torch.Tensor | None,
) -> None:
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        found = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise InputError(f"x must be tokens [B, C, H, W], found {found}")
    if not x.is_floating_point():
        raise InputError(f"x must be {dtypes.ANY}, found {x.dtype}")
    if x.shape[2] * x.shape[3] == 0:
        raise InputError(f"x needs at least one position, found shape {tuple(x.shape)}")
    channels, hidden = x.shape[1], fc1_weight.shape[0]
    wanted = {
        "norm_weight": (norm_weight, (channels,)), "norm_bias": (norm_bias, (channels,)),
        "fc1_weight": (fc1_weight, (hidden, channels)), "fc1_bias": (fc1_bias, (hidden,)),
        "fc2_weight": (fc2_weight, (channels, hidden)), "fc2_bias": (fc2_bias, (channels,)),
        "layer_scale": (layer_scale, (channels,)), "moments": (moments, (x.shape[0], 2, channels)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is None and name not in ("norm_weight", "norm_bias"):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{name} must be a tensor of shape {shape}, found {type(tensor).__name__}")
        size = tuple(tensor.shape)
        pointwise = len(shape) == 2 and size == (*shape, 1, 1)
        if size != shape and not pointwise:
            raise InputError(f"{name} must have shape {shape} for x {tuple(x.shape)}, found {size}")
        if tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device} and x on {x.device}; move one of them")
        if not tensor.is_floating_point():
            raise InputError(f"{name} must be floating point, found {tensor.dtype}")
    if moments is not None and moments.dtype not in (torch.float32, torch.float64):
        raise InputError(f"moments must be float32, found {moments.dtype}")
