"""The ops of the engine, one file each: schema, fake, plain-PyTorch reference, gradient.

Tokens are ordinary 4-D tensors [B, C, H, W], contiguous or channels_last. Moments are float32 [B, 2, C].
"""

from . import block, embed, head, moments, norm

ALL = {module.OP.name: module.OP for module in (moments, embed, block, norm, head)}

__all__ = ["ALL", "block", "embed", "head", "moments", "norm"]
