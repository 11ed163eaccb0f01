"""Fixtures of the tests of the command line and of the demo."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import riformer
from PIL import Image
from support_cli import pixels, tiny


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """These tests use one thread, where they ask for nothing else."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    riformer.save_checkpoint(tiny(), tmp_path / "tiny.safetensors")
    return str(tmp_path / "tiny.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three good images and a truncated one."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.png", "deeper/c.png")):
        Image.fromarray(pixels(index)).save(folder / name)
    whole = io.BytesIO()
    Image.fromarray(pixels(9)).save(whole, "PNG")
    (folder / "bad.png").write_bytes(whole.getvalue()[:800])
    return folder
