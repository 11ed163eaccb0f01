"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..dtypes import name_of
from ..network import Prepared
from ..ops import ALL as OPS


@dataclass(frozen=True, eq=False)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: "cpu", "reference", ...
        automatic: whether ``backend="auto"`` may choose it.
        devices: device types served; empty for all.
        dtypes: dtypes of the tokens.
        unusable: why it cannot be used on this machine, or None; asked each time, so that a repaired install shows.
        detail: one line for ``info`` and for reports, such as the instruction set chosen.
        ops: the callable for each op of ``riformer_kernels.ops.ALL``, by the op's name and with its signature.
        refuses: why one device of a served type is not served all the same (an older GPU), or None; without it all are.
        compiles: whether kernels are compiled when they are first used, so that ``patch`` had better use them.
        prepare: takes a whole network in one call, see ``network.py``; None where ops alone are offered.
        multiple: the numbers of channels, hidden ones too, must be multiples of it; 1: any number.
        int8: whether its blocks have int8 products, so that torch.int8 may be asked for in place of a dtype.
        slow: why products of a dtype are slow on this machine, or None; without it none are.
    """

    name: str
    automatic: bool
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    unusable: Callable[[], str | None]
    detail: Callable[[], str]
    ops: Mapping[str, Callable[..., Any]]
    refuses: Callable[[torch.device], str | None] | None = None
    compiles: bool = False
    prepare: Callable[..., Prepared] | None = None
    multiple: int = 8
    int8: bool = False
    slow: Callable[[torch.dtype], str | None] | None = None

    def __post_init__(self) -> None:
        if self.ops.keys() != OPS.keys():
            raise TypeError(f"backend {self.name!r} has the ops {sorted(self.ops)}, expected {sorted(OPS)}")

    def served(self, dtype: torch.dtype) -> str:
        """Name and detail for reports, with the reason why products of ``dtype`` are slow, if they are."""
        reason = self.slow(dtype) if self.slow is not None else None
        return f"{self.name} ({self.detail()}{f'; slow in {name_of(dtype)}: {reason}' if reason else ''})"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None when tokens of ``dtype`` on ``device`` are served, otherwise the reason."""
        if self.devices and device.type not in self.devices:
            return f"it serves {', '.join(self.devices)} tensors"
        if dtype not in self.dtypes and not (dtype == torch.int8 and self.int8):
            return f"it serves {', '.join(map(name_of, self.dtypes))}"
        reason = self.unusable()
        return self.refuses(device) if reason is None and self.refuses is not None else reason
