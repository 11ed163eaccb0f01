"""RIFormer (CVPR 2023) in plain PyTorch: the reference that `riformer_kernels` is checked against.

model = riformer.create_model("s12")                  # or "riformer-s12_in1k", pretrained=True
model.switch_to_deploy()
riformer.load_into(model, riformer.load_checkpoint("weights.pth"))
"""

from .arch import ARCHS, Arch, resolve_arch
from .checkpoint import (
    CheckpointError,
    CheckpointInfo,
    LoadResult,
    infer_arch,
    load_checkpoint,
    load_into,
    read_metadata,
    save_checkpoint,
)
from .count import count_macs, count_parameters
from .model import Affine, LayerNorm2d, Mlp, PatchEmbed, RIFormer, RIFormerBlock
from .randomize import randomize_
from .zoo import ZOO, DownloadError, ZooEntry, create_model, download, find_entry

__all__ = [
    "ARCHS", "Affine", "Arch", "CheckpointError", "CheckpointInfo", "DownloadError", "LayerNorm2d", "LoadResult", "Mlp",
    "PatchEmbed", "RIFormer", "RIFormerBlock", "ZOO", "ZooEntry", "count_macs", "count_parameters", "create_model",
    "download", "find_entry", "infer_arch", "load_checkpoint", "load_into", "randomize_", "read_metadata",
    "resolve_arch", "save_checkpoint",
]  # fmt: skip
