"""The ops of the engine, one file each: schema, fake, plain-PyTorch reference, gradient.

Tokens are ordinary 4-D tensors [B, C, H, W], contiguous or channels_last. Moments are float32 [B, 2, C].
"""

from . import block, embed, head, moments, norm
from ._library import CUDA_NAMESPACE, NAMESPACE, register

ALL = {op.name: op for op in (moments.OP, embed.OP, block.OP, block.IN_PLACE, norm.OP, head.OP)}

for _namespace in (NAMESPACE, CUDA_NAMESPACE):
    register(_namespace, ALL.values())

__all__ = ["ALL", "block", "embed", "head", "moments", "norm"]
