"""RIFormer in plain PyTorch: training-time and deployed form, backbone and classifier in one module.

Source: RIFormer (CVPR 2023), arXiv 2304.05659: a MetaFormer block whose token mixer is removed at inference. During
training an affine map stands in its place and is folded into the norm afterwards. The attribute and state-dict names
and every default are those of mmpretrain's ``RIFormer``, so that its checkpoints load by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arch import Arch, ArchLike, resolve_arch

__all__ = [
    "Affine", "ClassifierHead", "DropPath", "LayerNorm2d", "Mlp", "PatchEmbed", "RIFormer", "RIFormerBlock",
    "fold_affine", "make_norm",
]  # fmt: skip

NORMS = ("gn", "ln")
STEM = {"patch_size": 7, "stride": 4, "padding": 2}
DOWNSAMPLE = {"patch_size": 3, "stride": 2, "padding": 1}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each position of ``[B, C, H, W]``; same shape, dtype and memory format out.

    Not RIFormer's default: that is GroupNorm with one group, whose statistics run over C, H and W.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(num_channels, eps=eps)
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        y = y.permute(0, 3, 1, 2)
        return y if channels_last else y.contiguous()


def make_norm(kind: str, dim: int, eps: float = 1e-5) -> nn.GroupNorm | LayerNorm2d:
    """Build the norm called ``kind``: "gn" is GroupNorm with one group (the default), "ln" is `LayerNorm2d`.

    Raises:
        ValueError: any other name, or an eps that is not positive.
    """
    if kind not in NORMS:
        raise ValueError(
            f"unknown norm {kind!r}; expected 'gn' (GroupNorm with one group, what RIFormer uses) or 'ln' (LayerNorm "
            "over the channels of each position). BatchNorm is not offered: it does not fold at other batch statistics"
        )
    if not eps > 0:
        raise ValueError(f"norm_eps must be positive; found {eps!r}")
    return nn.GroupNorm(1, dim, eps=eps) if kind == "gn" else LayerNorm2d(dim, eps=eps)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the branch of a whole image with probability ``drop_prob``, rescale the rest.

    ``[B, ...]`` to the same shape; the identity in evaluation. Source: arXiv 1603.09382.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).add_(keep).floor_()
        return x.div(keep) * mask

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class Affine(nn.Module):
    """The stand-in for the token mixer: ``s * x + t - x`` per channel, ``[B, C, H, W]`` to the same shape.

    ``affine`` is a depthwise 1x1 convolution (scale s of shape ``[C, 1, 1, 1]``, shift t ``[C]``), mmpretrain's form.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.affine = nn.Conv2d(in_features, in_features, kernel_size=1, groups=in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x) - x


class Mlp(nn.Module):
    """Two 1x1 convolutions with exact (erf) GELU between: ``[B, C, H, W]`` to the same shape."""

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(in_features, hidden_features, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_features, in_features, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class PatchEmbed(nn.Module):
    """Stem or downsampling: one strided convolution, ``[B, in, H, W]`` to ``[B, out, (H + 2p - k) // s + 1, ...]``."""

    def __init__(self, in_channels: int, embed_dim: int, *, patch_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def fold_affine(gamma: Tensor, beta: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Fold ``Affine(Norm(x)) - Norm(x)`` into one norm: ``gamma' = gamma (s - 1)``, ``beta' = beta (s - 1) + t``.

    All arguments have C elements of any floating dtype; returns two ``[C]`` tensors in float64.
    """
    gamma, beta, scale, shift = (_float64(t).reshape(-1) for t in (gamma, beta, scale, shift))
    return gamma * (scale - 1), beta * (scale - 1) + shift


def _float64(t: Tensor) -> Tensor:
    # Apple's GPU has no float64.
    return (t.detach().cpu() if t.device.type == "mps" else t.detach()).to(torch.float64)


class RIFormerBlock(nn.Module):
    """One block, ``[B, C, H, W]`` to the same shape.

    Training-time form: ``x + ls1 * (Affine(n) - n)``, ``n = norm1(x)``; deployed form: ``x + ls1 * norm_reparam(x)``;
    both then add ``ls2 * mlp(norm2(x))``. Source: the paper's re-parameterisation; the fold is `fold_affine`.
    """

    def __init__(
        self, dim: int, mlp_ratio: float = 4.0, *, norm: str = "gn", norm_eps: float = 1e-5, drop: float = 0.0,
        drop_path: float = 0.0, layer_scale_init_value: float = 1e-5, deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if deploy:
            self.norm_reparam = make_norm(norm, dim, norm_eps)
        else:
            self.norm1 = make_norm(norm, dim, norm_eps)
            self.token_mixer = Affine(dim)
        self.norm2 = make_norm(norm, dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
        self.dim = dim
        self.deploy = deploy

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm_reparam(x) if self.deploy else self.token_mixer(self.norm1(x))
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * mixed)
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))

    @torch.no_grad()
    def switch_to_deploy(self) -> RIFormerBlock:
        """Fold the affine into the norm, in place, and return the block; nothing happens if that is done already.

        The fold is computed in float64 and rounded once to the norm's dtype. eps, device, dtype, training flag and
        whether gradients are wanted carry over; hooks on ``norm1`` and ``token_mixer`` go with those modules.
        """
        if self.deploy:
            return self
        old, affine = self.norm1, self.token_mixer.affine
        new = make_norm("ln" if isinstance(old, LayerNorm2d) else "gn", self.dim, old.eps)
        assert affine.bias is not None
        gamma, beta = fold_affine(old.weight, old.bias, affine.weight, affine.bias)
        new.weight = nn.Parameter(gamma.to(old.weight), old.weight.requires_grad or affine.weight.requires_grad)
        new.bias = nn.Parameter(beta.to(old.bias), old.bias.requires_grad or affine.bias.requires_grad)
        new.train(old.training)
        del self.norm1, self.token_mixer
        # First, where a block that is built deployed has it: some tools pair two models' parameters by their order.
        self._modules = {"norm_reparam": new, **self._modules}
        self.deploy = True
        return self


class ClassifierHead(nn.Module):
    """Mean over the positions of the last of the features, then ``fc``: ``[B, C, H, W]`` to ``[B, num_classes]``."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, num_classes)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        return self.fc(feats[-1].mean((-2, -1)))


class RIFormer(nn.Module):
    """RIFormer as a feature extractor (``num_classes=0``) or a classifier.

    Args:
        arch: "s12", "s24", "s36", "m36", "m48" (any case), or a dict as mmpretrain takes it, see `resolve_arch`.
        in_channels: channels of the images.
        num_classes: 0 for a backbone that returns features; otherwise a linear classifier ``head.fc`` is added.
        norm: "gn" = GroupNorm with one group (mean and variance over C x H x W of an image; what the published
            weights need), "ln" = LayerNorm over the channels of each position (mmpretrain's ``LN2d``).
        norm_eps: eps of every norm.
        deploy: build the deployed form, with ``norm_reparam`` in place of ``norm1`` and ``token_mixer``.
        out_indices: which entries of ``network`` to return, normed: 0, 2, 4, 6 are the stages, 1, 3, 5 the
            downsamplings; negative ones count from the end. An int, a sequence, or None for the last. Features come
            in the order of the network. A classifier needs the last one among them.
        drop_rate: dropout in the MLPs. drop_path_rate: stochastic depth, rising linearly from 0 at the first block.

    Raises:
        ValueError, TypeError: an argument outside what is described here; the message names what would be right.

    A fresh model has truncated-normal weights (std 0.02) and zero biases, as mmpretrain's configs have. With its layer
    scale of 1e-5 each block is then nearly the identity: for numeric tests use `riformer.randomize_`.
    """

    def __init__(
        self, arch: ArchLike = "s12", *, in_channels: int = 3, num_classes: int = 0, norm: str = "gn",
        norm_eps: float = 1e-5, deploy: bool = False, out_indices: Sequence[int] | int | None = None,
        drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.arch: Arch = resolve_arch(arch)
        self.in_channels = _count("in_channels", in_channels, 1)
        self.num_classes = _count("num_classes", num_classes, 0)
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1); found {rate!r}")
        self.norm_type = norm
        self.deploy = deploy

        dims, layers = self.arch.embed_dims, self.arch.layers
        rates = [drop_path_rate * i / max(sum(layers) - 1, 1) for i in range(sum(layers))]
        self.patch_embed = PatchEmbed(in_channels, dims[0], **STEM)
        network: list[nn.Module] = []
        for i, (dim, depth) in enumerate(zip(dims, layers, strict=True)):
            if i and dims[i - 1] != dim:
                network.append(PatchEmbed(dims[i - 1], dim, **DOWNSAMPLE))
            first = sum(layers[:i])
            network.append(nn.Sequential(*(
                RIFormerBlock(
                    dim, self.arch.mlp_ratios[i], norm=norm, norm_eps=norm_eps, drop=drop_rate, drop_path=rate,
                    layer_scale_init_value=self.arch.layer_scale_init_value, deploy=deploy,
                ) for rate in rates[first:first + depth]
            )))  # fmt: skip
        self.network = nn.ModuleList(network)

        self.out_indices = _positions(out_indices, len(network))
        for i in self.out_indices:
            self.add_module(f"norm{i}", make_norm(norm, self.arch.channels[i], norm_eps))
        if self.num_classes:
            last = len(network) - 1
            if last not in self.out_indices:
                raise ValueError(
                    f"a classifier needs the last position, {last}, in out_indices; found {list(self.out_indices)}. "
                    f"Add {last}, or build with num_classes=0 for features only"
                )
            self.head = ClassifierHead(dims[-1], num_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's generator: truncated normal, std 0.02, zero biases; norms and layer scales
        go back to their starting values."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, (nn.GroupNorm, LayerNorm2d)):
                module.reset_parameters()
            elif isinstance(module, RIFormerBlock):
                nn.init.constant_(module.layer_scale_1, self.arch.layer_scale_init_value)
                nn.init.constant_(module.layer_scale_2, self.arch.layer_scale_init_value)

    def forward_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[B, in_channels, H, W]`` floating point, H and W at least 3, to the normed features at ``out_indices``.

        Stage i has ``[B, embed_dims[i], h, w]``, with h and w a quarter of the image, halved at each downsampling.

        Raises:
            TypeError: not a tensor, not floating point, or (outside autocast) not of the parameters' dtype.
            ValueError: not four dimensions, another number of channels, or too small.
        """
        self._check_images(x)
        x = self.patch_embed(x)
        outs = []
        for i, stage in enumerate(self.network):
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f"norm{i}")(x))
        return tuple(outs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        """The features of `forward_features`, or with a head the logits ``[B, num_classes]``. Same errors."""
        feats = self.forward_features(x)
        return self.head(feats) if self.num_classes else feats

    def switch_to_deploy(self) -> RIFormer:
        """Fold every block's affine into its norm, in place, see `RIFormerBlock.switch_to_deploy`; return the model.

        Computes the same function as before, up to one rounding of each folded parameter. A second call does nothing.
        """
        for module in self.modules():
            if isinstance(module, RIFormerBlock):
                module.switch_to_deploy()
        self.deploy = True
        return self

    def extra_repr(self) -> str:
        size = self.arch.name or f"layers={self.arch.layers}, embed_dims={self.arch.embed_dims}"
        return f"{size}, norm={self.norm_type}, {'deployed' if self.deploy else 'training-time'} form"

    def _check_images(self, x: Tensor) -> None:
        want = f"floating-point images of shape [B, {self.in_channels}, H, W]"
        if not isinstance(x, Tensor):
            raise TypeError(f"expected {want} as a torch.Tensor; found {type(x).__name__}. Try torch.as_tensor(images)")
        shape = list(x.shape)
        if x.ndim != 4:
            hint = ". Add the batch dimension with images.unsqueeze(0)" if x.ndim == 3 else ""
            raise ValueError(f"expected {want}; found {x.ndim} dimensions, shape {shape}{hint}")
        if x.shape[1] != self.in_channels:
            if x.shape[3] == self.in_channels:
                hint = "It looks like [B, H, W, C]: use images.permute(0, 3, 1, 2)"
            else:
                hint = f"Convert the images, or build the model with in_channels={x.shape[1]}"
            raise ValueError(f"expected {want}; found {x.shape[1]} channels, shape {shape}. {hint}")
        if not x.is_floating_point():
            raise TypeError(f"expected {want}; found {x.dtype}. Convert and normalise: (images.float() - mean) / std")
        dtype = self.patch_embed.proj.weight.dtype
        if x.dtype != dtype and not _autocast(x.device.type):
            raise TypeError(
                f"images are {x.dtype} and the model's parameters {dtype}; "
                f"use images.to({dtype}), model.to({x.dtype}) or torch.autocast"
            )
        if x.shape[2] < 3 or x.shape[3] < 3:
            raise ValueError(f"expected {want} with H and W at least 3 (the stem's window); found shape {shape}")


def _autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; found {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; found {value}")
    return value


def _positions(out_indices: Sequence[int] | int | None, count: int) -> tuple[int, ...]:
    """The checked, non-negative, ascending form of ``out_indices``."""
    indices = [-1] if out_indices is None else out_indices
    indices = [indices] if isinstance(indices, int) else indices
    want = f"expected ints from {-count} to {count - 1} (positions in the network), each at most once"
    if not isinstance(indices, Sequence) or isinstance(indices, str) or not indices:
        raise TypeError(f"out_indices is {out_indices!r}; {want}")
    if any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise TypeError(f"out_indices is {out_indices!r}; {want}")
    found = [i + count if i < 0 else i for i in indices]
    if any(not 0 <= i < count for i in found) or len(set(found)) != len(found):
        raise ValueError(f"out_indices is {out_indices!r}; {want}")
    return tuple(sorted(found))
