"""How tests read and replace the ops of a backend, in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from riformer_kernels import ops
from riformer_kernels.backends import Backend


def ops_of(backend: Backend) -> dict[str, Callable[..., Any]]:
    """The ops of ``backend`` by name."""
    return {name: getattr(backend, name) for name in ops.ALL}


def with_ops(backend: Backend, replaced: Mapping[str, Callable[..., Any]], **fields: Any) -> Backend:
    """``backend`` with these ops replaced, and with other values of these fields."""
    return dataclasses.replace(backend, **replaced, **fields)
