"""What the conformance suite runs against. A target says how the ops are called there, and which cases it serves.

The targets are the CPU's kernels (`support_cpu`), the CUDA kernels on the emulator (`support_emulated`), Triton's
kernels in its interpreter (`support_interpreted`), the PTX of both, interpreted (`support_ptx_cuda`,
`support_ptx_triton`), and both on a GPU (`support_gpu`). ``pytest --target=NAME`` chooses one. Without it the suite
runs against the CPU, and against the GPU's two where there is a GPU. The emulated and the interpreted target need
processes of their own, which `tests/gpu/test_cuda.py` and `tests/gpu/test_triton.py` start.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from support_block import PARAMETERS
from support_cases import DTYPES, EPS
from support_guards import check_surroundings, surrounded

MODULES = {
    "cpu": "support_cpu",
    "triton": "support_gpu",
    "cuda": "support_gpu",
    "emulated": "support_emulated",
    "interpreted": "support_interpreted",
    "ptx-cuda": "support_ptx_cuda",
    "ptx-triton": "support_ptx_triton",
}
ORDINARY = ("cpu", "triton", "cuda")


@dataclass(frozen=True)
class Setting:
    """One way for a target to run: with an instruction set, or as a GPU of some architecture."""

    name: str = ""
    active: Callable[[], AbstractContextManager] = contextlib.nullcontext


@dataclass(frozen=True)
class Target:
    """An implementation of every op of `riformer_kernels.ops.ALL`.

    Attributes:
        name: its name on pytest's command line.
        ops: from the name of an op to a callable with the op's arguments.
        settings: every way for it to run.
        few: the settings for a case that needs one setting for each set of kernels.
        one: the settings for a case whose kernels are the same everywhere.
        dtypes: of the tokens, for ops that compute products.
        width: the number of channels must be a multiple of it.
        int8: whether it serves blocks whose products are int8.
        most_work: multiply-adds of the largest case; more takes too long here.
        grid: the cases that this target has besides the common ones, by op.
        device: where its tensors are.
        embeds_channels_last: whether ``embed`` writes channels_last, whatever the layout of its images.
        guarded: a context in which the tensors that an op allocates lie between guards, and hold NaN until written.
        why_not: why it cannot run on this machine, or None.
        marks: pytest marks of its tests.
    """

    name: str
    ops: Mapping[str, Callable[..., Any]]
    settings: tuple[Setting, ...] = (Setting(),)
    few: tuple[Setting, ...] = (Setting(),)
    one: tuple[Setting, ...] = (Setting(),)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    width: int = 1
    int8: bool = False
    most_work: int = 1 << 40
    grid: Mapping[str, tuple] = field(default_factory=dict)
    device: str = "cpu"
    embeds_channels_last: bool = False
    guarded: Callable[[], AbstractContextManager] = contextlib.nullcontext
    why_not: Callable[[], str | None] = lambda: None
    marks: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.name

    # The ops, with the arguments that the checks give them.

    def _there(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def call(self, op: str, *arguments: Any) -> Any:
        """The op on this target's device; the results where the arguments came from."""
        found = self.ops[op](*(self._there(value) for value in arguments))
        return tuple(value.cpu() for value in found) if isinstance(found, tuple) else found.cpu()

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        return self.call("moments", x)

    def moments_for(self, x: torch.Tensor, per_position: bool) -> torch.Tensor | None:
        """What the ops that have a norm take: LayerNorm takes its statistics from the tokens themselves."""
        return None if per_position else self.moments(x)

    def block(self, x: torch.Tensor, p: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.call("block", x, self.moments_for(x, p["per_position"]), *(p[name] for name in PARAMETERS))

    def block_(self, x: torch.Tensor, p: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The op that overwrites its tokens and moments, on copies between guards."""
        dense = x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
        written = surrounded(self._there(dense))
        moments = self.moments_for(x, p["per_position"])
        held = None if moments is None else surrounded(self._there(moments))
        self.ops["block_"](written, held, *(self._there(p[name]) for name in PARAMETERS))
        check_surroundings(written)
        if held is None:
            return written.cpu().clone(), torch.empty((x.shape[0], 2, 0))
        check_surroundings(held)
        return written.cpu().clone(), held.cpu().clone()

    def embed(self, x: torch.Tensor, p: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens in NCHW, which is what `support_embed.check_embed` expects of every target."""
        out, moments = self.call("embed", x, p["weight"], p["bias"], p["stride"], p["padding"], dtype, True)
        if self.embeds_channels_last:
            assert out.is_contiguous(memory_format=torch.channels_last), out.stride()
            out = out.contiguous()
        return out, moments

    def norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        per_position: bool,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        moments = self.moments_for(x, per_position)
        return self.call("norm", x, moments, weight, bias, eps, per_position, dtype or x.dtype)

    def head(self, x: torch.Tensor, p: list, per_position: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
        moments = self.moments_for(x, per_position)
        return self.call("head", x, moments, p[0], p[1], EPS, p[2], p[3], per_position, dtype or x.dtype)


_chosen: list[str] = []


def choose(names: list[str]) -> None:
    """pytest's command line names the targets of this process; see `tests/conftest.py`."""
    _chosen[:] = names


def load(name: str) -> Target:
    return importlib.import_module(MODULES[name]).TARGETS[name]


def chosen() -> list[Target]:
    """The targets of this process."""
    return [load(name) for name in _chosen or ORDINARY]
