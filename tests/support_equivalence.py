"""Whole models against the error-ratio rule: a run of a model of its own, eager PyTorch, and golden in float64."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from riformer.model import RIFormer
from riformer.randomize import randomize_
from support_cases import check_ratios
from support_compare import outputs

SMALL = {"layers": [1, 2, 1, 1], "embed_dims": [24, 40, 64, 72], "mlp_ratios": [4, 2, 3, 1]}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def named(arch):
    return SMALL if arch == "small" else arch


@lru_cache(maxsize=16)
def model_of(arch, deploy, dtype, classes, norm="gn", seed=0):
    options = {"num_classes": classes} if classes else {"out_indices": (0, 2, 4, 6)}
    model = randomize_(RIFormer(named(arch), deploy=deploy, norm=norm, **options), seed)
    return model.to(dtype).eval()


def images_of(size, batch, dtype, seed=0):
    return torch.randn((batch, 3, *size), generator=torch.Generator().manual_seed(seed)).to(dtype)


@lru_cache(maxsize=64)
@torch.inference_mode()
def golden_of(arch, deploy, dtype, classes, norm, size, batch, seed):
    model = copy.deepcopy(model_of(arch, deploy, dtype, classes, norm, seed)).double()
    return outputs(model(images_of(size, batch, dtype, seed).double()))


@lru_cache(maxsize=64)
@torch.inference_mode()
def eager_of(arch, deploy, dtype, classes, norm, size, batch, seed, layout):
    model, images = laid_out(arch, deploy, dtype, classes, norm, size, batch, seed, layout)
    return outputs(model(images))


def laid_out(arch, deploy, dtype, classes, norm, size, batch, seed, layout):
    """A model of its own and its images, both in ``layout``."""
    model = copy.deepcopy(model_of(arch, deploy, dtype, classes, norm, seed)).to(memory_format=FORMATS[layout])
    return model, images_of(size, batch, dtype, seed).contiguous(memory_format=FORMATS[layout])


def check_model(run, arch, deploy, dtype, layout, size, label, classes=0, norm="gn", batch=1, seeds=(0,)):
    """``run(model, images)`` on a model of its own against the untouched one; small results are pooled over seeds."""
    found, eager, golden = [], [], []
    for seed in seeds:
        case = arch, deploy, dtype, classes, norm, size, batch, seed
        eager.append(eager_of(*case, layout))
        golden.append(golden_of(*case))
        with torch.inference_mode():
            found.append(outputs(run(*laid_out(*case, layout))))
        for mine, theirs in zip(found[-1], eager[-1], strict=True):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    by_result = (zip(*results, strict=True) for results in (found, eager, golden))
    for i, (mine, theirs, exact) in enumerate(zip(*by_result, strict=True)):
        name = "logits" if classes else f"features of stage {i + 1}"
        where = f"{label}: {arch} {'deployed' if deploy else 'training-time'} {norm} {dtype} {layout} {size}, {name}"
        check_ratios(torch.cat(mine), torch.cat(theirs), torch.cat(exact), where, dtype)
