"""Whole models through ``patch``: features and logits by the error-ratio rule, for every form, dtype and layout."""

from __future__ import annotations

import copy

import pytest
import torch
from support_cases import DTYPES, check_ratios
from support_cpu import ISAS
from support_equivalence import check_model, images_of, model_of

import riformer_kernels
from riformer_kernels.machine import threads

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = [isa for isa in ISAS if isa not in ("scalar", "amx-emulated")] or list(ISAS)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
per_form = pytest.mark.parametrize("deploy", [False, True], ids=["training", "deployed"])
per_layout = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


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
