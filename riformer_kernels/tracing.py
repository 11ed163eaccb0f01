"""What torch.compile and torch.export are told about this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_while_tracing(function: Function) -> Function:
    """Have Python call ``function`` while a model is traced, and put the result into the graph as a constant.

    The same as ``torch.compiler.assume_constant_result``. That one imports the whole of torch.compile to set this
    attribute, which would make importing this package take a second longer for everybody.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take any attribute
    return function
