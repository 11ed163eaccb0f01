"""The algebra that lets one pass over the tokens carry a whole block (RIFormer, arXiv 2304.05659, section 3.3).

Everything is written for one image as *moments*: per channel c the mean ``m_c`` and the centred sum of squares
``V_c`` over the N = H*W positions. Tensors of moments have shape [B, 2, C]: row 0 holds m, row 1 holds V.
"""

from __future__ import annotations

import torch


def moments_of(x: torch.Tensor) -> torch.Tensor:
    """Moments [B, 2, C] of images ``x`` [B, C, H, W], two-pass, in ``x``'s dtype."""
    tokens = x.flatten(2)
    mean = tokens.mean(dim=2)
    centred = (tokens - mean.unsqueeze(2)).square().sum(dim=2)
    return torch.stack((mean, centred), dim=1)


def group_statistics(moments: torch.Tensor, count: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and rstd over C x H x W of each image, from its moments.

    mu = avg_c m_c;  var = (sum_c V_c + N sum_c (m_c - mu)^2) / (N C);  rstd = (var + eps)^-1/2

    Args:
        moments: [B, 2, C].
        count: N, the positions behind every channel's moments.
        eps: the norm's epsilon.

    Returns:
        ``(mu, rstd)``, each [B, 1].
    """
    mean, centred = moments.unbind(dim=1)
    mu = mean.mean(dim=1, keepdim=True)
    total = centred.sum(dim=1) + count * (mean - mu).square().sum(dim=1)
    variance = total.unsqueeze(1) / (count * mean.shape[1])
    return mu, (variance + eps).rsqrt()


def fold_affine(
    weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the token mixer ``Affine(n) - n`` into the norm before it: gamma (s - 1), beta (s - 1) + t.

    Args:
        weight, bias: gamma and beta of the norm, [C].
        scale, shift: s and t of the affine, [C] (any shape with C elements), or None for a deployed block.

    Returns:
        gamma', beta' of the deployed norm, [C].
    """
    if scale is None:
        return weight, bias
    difference = scale.reshape(-1) - 1
    folded = bias * difference
    return weight * difference, folded if shift is None else folded + shift.reshape(-1)


def first_half(
    moments: torch.Tensor,
    count: int,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    layer_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``y = x + ls1 * GroupNorm(x)`` as an affine map per image and channel, and the moments of y.

    a_c = 1 + r ls1_c gamma_c,  d_c = ls1_c (beta_c - mu r gamma_c);  y = a x + d
    mean_y = a m + d,  V_y = a^2 V: no pass over y is needed.

    Returns:
        ``(a, d, moments_y)`` of shapes [B, C], [B, C], [B, 2, C].
    """
    mu, rstd = group_statistics(moments, count, eps)
    a = 1 + rstd * layer_scale * weight
    d = layer_scale * (bias - mu * rstd * weight)
    mean, centred = moments.unbind(dim=1)
    return a, d, torch.stack((a * mean + d, a.square() * centred), dim=1)


def position_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm over the channels of each position of ``x`` [B, C, H, W] (mmpretrain's ``LN2d``)."""
    mean = x.mean(dim=1, keepdim=True)
    variance = (x - mean).square().mean(dim=1, keepdim=True)
    normed = (x - mean) * (variance + eps).rsqrt()
    return normed * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def group_norm(
    x: torch.Tensor, moments: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """GroupNorm with one group of ``x`` [B, C, H, W], its statistics taken from ``moments``."""
    mu, rstd = group_statistics(moments, x.shape[2] * x.shape[3], eps)
    normed = (x - mu.view(-1, 1, 1, 1)) * rstd.view(-1, 1, 1, 1)
    return normed * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
