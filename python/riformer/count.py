"""Parameters and multiply-adds of a RIFormer, from its shape alone."""

from __future__ import annotations

from .arch import ArchLike, resolve_arch
from .model import DOWNSAMPLE, STEM, RIFormer

__all__ = ["count_macs", "count_parameters"]


def count_parameters(
    model_or_arch: RIFormer | ArchLike, *, in_channels: int = 3, num_classes: int = 1000, deploy: bool = True
) -> int:
    """Number of parameters of a model, or of the arch with one output norm and a classifier.

    The arguments after the first describe the model that an arch stands for; a `RIFormer` is counted as it is.
    Published figures (11.92 M for s12, ...) are those of the deployed form with 1000 classes.
    """
    if isinstance(model_or_arch, RIFormer):
        return sum(parameter.numel() for parameter in model_or_arch.parameters())
    arch = resolve_arch(model_or_arch)
    total = arch.embed_dims[0] * (in_channels * STEM["patch_size"] ** 2 + 1)
    for before, dim in zip(arch.embed_dims, arch.embed_dims[1:], strict=False):
        total += dim * (before * DOWNSAMPLE["patch_size"] ** 2 + 1) if before != dim else 0
    for depth, dim, hidden in zip(arch.layers, arch.embed_dims, arch.hidden_dims, strict=True):
        norms_affine_scales = (6 if deploy else 8) * dim
        total += depth * (norms_affine_scales + 2 * dim * hidden + hidden + dim)
    last = arch.embed_dims[-1]
    return total + 2 * last + (last + 1) * num_classes


def count_macs(
    model_or_arch: RIFormer | ArchLike, image_size: int | tuple[int, int] = 224, *, count: str = "published",
    in_channels: int = 3, num_classes: int = 1000, deploy: bool = True,
) -> int:  # fmt: skip
    """Multiply-adds for one image of ``image_size`` (pixels, or (H, W)).

    ``count="products"``: those of the convolutions and the classifier, what a matrix unit has to do. (A training-time
    affine is a convolution, one per element.)
    ``count="published"``: the convention behind the published figures (1.82 G for s12 at 224), which are mmengine's
    and fvcore's: 5 for each element of a norm's input on top, and the classifier left out.
    GELU, layer scale and residuals are counted by neither. ``in_channels``, ``num_classes`` and ``deploy`` describe
    the model that an arch stands for; for a `RIFormer` they are read from the model.

    Raises:
        ValueError: an image smaller than the stem's window, or an unknown ``count``.
    """
    if isinstance(model_or_arch, RIFormer):
        model = model_or_arch
        arch, in_channels, num_classes, deploy = model.arch, model.in_channels, model.num_classes, model.deploy
    else:
        arch = resolve_arch(model_or_arch)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 3:
        raise ValueError(f"image_size must be one number or (H, W), each at least 3; found {image_size!r}")
    if count not in ("published", "products"):
        raise ValueError(f"count must be 'published' or 'products'; found {count!r}")

    products, normed, width = 0, 0, in_channels
    for depth, dim, hidden in zip(arch.layers, arch.embed_dims, arch.hidden_dims, strict=True):
        if products == 0 or dim != width:
            conv = STEM if products == 0 else DOWNSAMPLE
            size = tuple((n + 2 * conv["padding"] - conv["patch_size"]) // conv["stride"] + 1 for n in size)
            products += size[0] * size[1] * width * dim * conv["patch_size"] ** 2
            width = dim
        products += depth * size[0] * size[1] * dim * (2 * hidden + (0 if deploy else 1))
        normed += depth * size[0] * size[1] * dim * 2
    normed += size[0] * size[1] * width
    return products + width * num_classes if count == "products" else products + 5 * normed
