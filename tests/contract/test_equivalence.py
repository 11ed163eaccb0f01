"""Whole models through ``patch``: features and logits by the error-ratio rule, for every form, dtype and layout."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from riformer.model import RIFormer
from riformer.randomize import randomize_
from support_ops import (  # noqa: F401
    DTYPES,
    ISAS,
    check_ratios,
    isa_fixture,
    one_thread,
    threads,
)

import riformer_kernels

SMALL = {"layers": [1, 2, 1, 1], "embed_dims": [24, 40, 64, 72], "mlp_ratios": [4, 2, 3, 1]}
FAST = [isa for isa in ISAS if isa not in ("scalar", "amx-emulated")] or list(ISAS)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
per_form = pytest.mark.parametrize("deploy", [False, True], ids=["training", "deployed"])
per_layout = pytest.mark.parametrize("layout", ["nchw", "channels_last"])
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def named(arch):
    return SMALL if arch == "small" else arch


@lru_cache(maxsize=8)
def model_of(arch, deploy, dtype, classes, norm="gn", seed=0):
    options = {"num_classes": classes} if classes else {"out_indices": (0, 2, 4, 6)}
    model = randomize_(RIFormer(named(arch), deploy=deploy, norm=norm, **options), seed)
    return model.to(dtype).eval()


def images_of(size, batch, dtype, seed=0):
    return torch.randn((batch, 3, *size), generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


@lru_cache(maxsize=4)
@torch.inference_mode()
def golden_of(arch, deploy, dtype, classes, norm, size, batch, seed):
    model = copy.deepcopy(model_of(arch, deploy, dtype, classes, norm, seed)).double()
    return outputs(model(images_of(size, batch, dtype, seed).double()))


def check_model(run, arch, deploy, dtype, layout, size, label, classes=0, norm="gn", batch=1, seeds=(0,)):
    """``run(model, images)`` on a model of its own against the untouched one; small results are pooled over seeds."""
    found, eager, golden = [], [], []
    for seed in seeds:
        model = copy.deepcopy(model_of(arch, deploy, dtype, classes, norm, seed)).to(memory_format=FORMATS[layout])
        images = images_of(size, batch, dtype, seed).contiguous(memory_format=FORMATS[layout])
        with torch.inference_mode():
            eager.append(outputs(model(images)))
            golden.append(golden_of(arch, deploy, dtype, classes, norm, size, batch, seed))
            found.append(outputs(run(model, images)))
        for mine, theirs in zip(found[-1], eager[-1], strict=True):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    for i, (mine, theirs, exact) in enumerate(
        zip(zip(*found, strict=True), zip(*eager, strict=True), zip(*golden, strict=True), strict=True)
    ):
        name = "logits" if classes else f"features of stage {i + 1}"
        where = f"{label}: {arch} {'deployed' if deploy else 'training-time'} {norm} {dtype} {layout} {size}, {name}"
        check_ratios(torch.cat(mine), torch.cat(theirs), torch.cat(exact), where, dtype)


def patched(isa):
    """Patches with the instruction set selected, and proves by the report that everything was replaced."""

    def run(model, images):
        handle = riformer_kernels.patch(model, verify=False)
        found = model(images)
        assert handle.report and all(row.reason is None for row in handle.report), str(handle)
        stages = [row for row in handle.report if row.kind == "stage"]
        assert sum(row.fused for row in stages) == sum(row.total for row in stages) == sum(model.arch.layers)
        assert all(row.backend == f"cpu ({isa})" for row in handle.report), str(handle)
        return found

    return run


@pytest.mark.parametrize("isa", FAST, indirect=True)
@per_dtype
@per_form
@per_layout
@pytest.mark.parametrize("classes", [0, 1000], ids=["features", "logits"])
def test_s12_at_224(isa, layout, deploy, dtype, classes):
    check_model(patched(isa), "s12", deploy, dtype, layout, (224, 224), isa, classes)


@pytest.mark.parametrize("isa", FAST[:1], indirect=True)
@per_dtype
@pytest.mark.parametrize(("deploy", "layout", "classes"), [(True, "channels_last", 0), (False, "nchw", 1000)])
def test_s12_at_384(isa, layout, deploy, dtype, classes):
    check_model(patched(isa), "s12", deploy, dtype, layout, (384, 384), isa, classes)


@pytest.mark.parametrize("isa", FAST[:1], indirect=True)
@per_dtype
@per_layout
@pytest.mark.parametrize(("deploy", "classes"), [(False, 0), (True, 1000)])
def test_s12_at_an_odd_size(isa, layout, deploy, dtype, classes):
    check_model(patched(isa), "s12", deploy, dtype, layout, (225, 193), isa, classes, batch=2)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@per_dtype
@per_form
@pytest.mark.parametrize("classes", [0, 1000], ids=["features", "logits"])
def test_s12_down_to_one_position(isa, deploy, dtype, classes):
    """32 px: the last stage has 1x1 positions."""
    check_model(patched(isa), "s12", deploy, dtype, "nchw", (32, 32), isa, classes, batch=2, seeds=(0, 1, 2))


@pytest.mark.parametrize("isa", FAST[:1], indirect=True)
@pytest.mark.parametrize("count", [2, 4])
def test_threads_change_no_bit_of_a_model(isa, count):
    """One thread is used elsewhere: two that wait for each other on a busy machine take a hundred times as long."""
    model = copy.deepcopy(model_of("small", False, torch.float32, 10))
    riformer_kernels.patch(model, verify=False)
    images = images_of((65, 49), 3, torch.float32)
    with torch.inference_mode():
        expected = model(images)
        with threads(count):
            assert torch.equal(model(images), expected)


@pytest.mark.parametrize("isa", FAST[:1], indirect=True)
@per_dtype
@pytest.mark.parametrize(("arch", "size", "deploy"), [("m36", (96, 96), True), ("s24", (64, 64), False)])
def test_deeper_and_wider(isa, arch, size, deploy, dtype):
    check_model(patched(isa), arch, deploy, dtype, "nchw", size, isa, batch=2)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@per_dtype
@per_form
@per_layout
@pytest.mark.parametrize("norm", ["gn", "ln"])
@pytest.mark.parametrize("classes", [0, 10], ids=["features", "logits"])
def test_small_arch_with_both_norms(isa, dtype, deploy, layout, norm, classes):
    seeds = range(12) if classes else range(3)
    check_model(patched(isa), "small", deploy, dtype, layout, (65, 49), isa, classes, norm, batch=3, seeds=tuple(seeds))


@pytest.mark.parametrize("isa", FAST[:1], indirect=True)
@per_form
def test_float32_model_that_computes_in_bfloat16(isa, deploy):
    """Golden keeps the float32 parameters and images; eager is the model in bfloat16."""
    model = copy.deepcopy(model_of("small", deploy, torch.float32, 0))
    images = images_of((65, 49), 8, torch.float32)
    with torch.inference_mode():
        golden = copy.deepcopy(model).double()(images.double())
        eager = copy.deepcopy(model).bfloat16()(images.bfloat16())
        handle = riformer_kernels.patch(model, compute_dtype=torch.bfloat16, verify=False)
        found = model(images)
    assert all(row.reason is None and row.dtype == "bfloat16" for row in handle.report)
    for i, (mine, theirs, exact) in enumerate(zip(found, eager, golden, strict=True)):
        assert mine.dtype == torch.float32
        check_ratios(mine, theirs, exact, f"{isa}: compute_dtype, stage {i + 1}", torch.bfloat16)
