"""Tiny models that the tests share."""

from __future__ import annotations

TINY = {"layers": [2, 2, 2, 2], "embed_dims": [16, 32, 48, 64]}
