"""Make ``import mmpretrain`` possible beside any torch, for the tests that compare with the real thing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from types import ModuleType

import pytest
import torch

_kept: list[torch.library.Library] = []


def import_mmpretrain() -> ModuleType:
    """Return the module ``mmpretrain`` with its registry scope active; skip the test where it is not installed.

    Installed but not importable is a failure, not a skip: otherwise a half-made environment looks like a pass.
    """
    how = "pip install --no-deps -r tests/requirements-mmpretrain.txt"
    if importlib.util.find_spec("mmpretrain") is None:
        pytest.skip(f"mmpretrain is not installed; {how}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mmcv-lite warns about operators that RIFormer does not use.
            _import_torchvision()
            mmpretrain = importlib.import_module("mmpretrain")
            importlib.import_module("mmpretrain.models")
            # Only with the scope active does mmcv's norm builder find mmpretrain's LN2d.
            importlib.import_module("mmengine.registry").init_default_scope("mmpretrain")
    except ImportError as error:
        pytest.fail(f"mmpretrain is installed but cannot be imported ({error}); {how}")
    return mmpretrain


def _import_torchvision() -> None:
    """Import torchvision, whose PyPI wheel needs CUDA libraries for its operators.

    Without them the import fails where it attaches meta functions to ``nms`` and ``qnms``. RIFormer uses neither: it
    is enough that the schemas exist.
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    if not _kept:
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # The schemas live as long as this object.
    importlib.import_module("torchvision")
