"""The int8 form of a block's MLP, stated in plain PyTorch: what its products compute and what they are corrected by.

Weights are signed bytes with a scale per output channel, and what they multiply are unsigned bytes with a scale per
token. W2 and the hidden tensor have such scales for each chunk of hidden channels. Every scale comes from the values at
hand, so there is nothing to calibrate and nothing that may be stale.

Rounding a weight shifts a result by nearly the same amount at all positions of an image, as the channels have means.
What is averaged over the positions collects such shifts, so they are taken out, image by image:

- z goes through the product without its mean. W1 mean(z) is added in float.
- (W2 - rounded W2) mean(hidden) is added. The mean is an estimate, since the kernels need it before the hidden
  channels: that of GELU over normally distributed values, with their true mean W1 mean(z) + b1 and the standard
  deviation |row of W1| * (that of z over the positions).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK = 256  # hidden channels, as in csrc/cpu/block_int8.h
SHIFT = 0.17  # GELU is not less than -0.16998
SMALLEST_RANGE = 1e-30


def mlp(
    z: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
) -> torch.Tensor:
    """``W2 gelu(W1 z + b1) + b2`` by int8 products.

    Args:
        z: normalised tokens [B, C, H, W].
        fc1_weight, fc1_bias: [hidden, C] and [hidden] or None.
        fc2_weight, fc2_bias: [C, hidden] and [C] or None.

    Returns:
        [B, C, H, W] in ``z``'s dtype.

    Raises:
        RuntimeError: a weight has values that are not finite.
    """
    tokens = z.flatten(2)
    mean = tokens.mean(dim=2)
    centred = tokens - mean.unsqueeze(2)
    bias = F.linear(mean, fc1_weight, fc1_bias)
    hidden = F.gelu(F.linear(_bytes(centred).mT, rounded(fc1_weight, "fc1_weight")).mT + bias.unsqueeze(2))
    spread = centred.square().mean(dim=(1, 2)).sqrt()
    estimate = mean_of_gelu(bias, spread.unsqueeze(1) * fc1_weight.square().sum(dim=1).sqrt())
    weights = [rounded(part, "fc2_weight") for part in fc2_weight.split(CHUNK, dim=1)]
    correction = F.linear(estimate, fc2_weight - torch.cat(weights, dim=1), fc2_bias)
    out = correction.unsqueeze(2).expand(-1, -1, tokens.shape[2])
    for part, weight in zip(hidden.split(CHUNK, dim=1), weights, strict=True):
        highest = part.amax(dim=1, keepdim=True).clamp(min=0)
        out = out + F.linear(_rounded(part, (highest + SHIFT) / 255, -SHIFT).mT, weight).mT
    return out.reshape(z.shape[0], -1, *z.shape[2:])


def rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
    """A weight's rows as signed bytes with a scale, given back as floats."""
    if not torch.isfinite(weight).all():
        raise RuntimeError(f"riformer::block: {name} has values that are not finite, and no scale makes int8 of those")
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_RANGE) / 127
    return _rounded(weight, scale, 0.0)


def mean_of_gelu(mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """The mean of GELU over normally distributed values, by Gauss-Hermite quadrature with three nodes."""
    step = deviation * 3**0.5
    return (F.gelu(mean + step) + F.gelu(mean - step)) / 6 + F.gelu(mean) * (2 / 3)


def _bytes(z: torch.Tensor) -> torch.Tensor:
    """Tokens [B, C, positions] as unsigned bytes with a scale and a lowest value per token, given back as floats.

    Zero, which is the mean, is in the range of every token.
    """
    low, high = z.amin(dim=1, keepdim=True).clamp(max=0), z.amax(dim=1, keepdim=True).clamp(min=0)
    return _rounded(z, (high - low).clamp(min=SMALLEST_RANGE) / 255, low)


def _rounded(value: torch.Tensor, scale: torch.Tensor, low: torch.Tensor | float) -> torch.Tensor:
    """The multiple of ``scale`` above ``low`` that is nearest."""
    return ((value - low) / scale).round() * scale + low
