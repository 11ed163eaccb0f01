"""The CUDA kernels as ops on CPU tensors: the PTX that nvcc makes of them is interpreted.

The launchers of csrc/cuda run unchanged on a fake CUDA runtime, so that forms, grids, clusters, shared memory, argument
structs and tensor maps are those of a GPU. Only the bindings are not there: what they do with tensors before a launch
is done here in Python (`tests/gpu/emulated` tests them).
"""

from __future__ import annotations

import contextlib
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from support_block import PARAMETERS
from support_cases import like
from support_ptx.host import Host
from support_ptx_build import NO_NVCC, built
from support_target import Setting, Target

from riformer_kernels.dtypes import number_of

NUMPY = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.uint16}
MATRICES = ("fc1_weight", "fc2_weight")


@dataclass
class Gpu:
    """The GPU that the launchers are told of. ``offset``: bytes by which tokens and matrices miss the alignment of an
    allocation; the launchers promise to take multiples of 16."""

    architecture: int = 90
    processors: int = 4
    offset: int = 0
    seed: int = 0


gpu = Gpu()


@contextlib.contextmanager
def on(**changes: int) -> Iterator[None]:
    """Another GPU meanwhile."""
    before = vars(gpu).copy()
    vars(gpu).update(changes)
    try:
        yield
    finally:
        vars(gpu).update(before)


@cache
def host() -> Host:
    return Host(*built())


def word(value: Any) -> int:
    if isinstance(value, float):
        return struct.unpack("<q", struct.pack("<d", value))[0]
    if isinstance(value, torch.dtype):
        return number_of(value)
    return 0 if value is None else int(value)


@dataclass
class Call:
    """The arguments of one call, and the memory that they lie in."""

    machine: Host = field(default_factory=host)

    def put(self, x: torch.Tensor, offset: int = 0) -> int:
        """A dense tensor's bytes, in the order of its dimensions."""
        raw = x.detach().contiguous().view(torch.uint8 if x.dtype == torch.uint8 else _bits(x.dtype)).numpy()
        raw = np.concatenate([np.zeros(offset, np.uint8), raw.reshape(-1).view(np.uint8)])
        return self.machine.memory.put(raw) + offset

    def room(self, count: int, dtype: torch.dtype, offset: int = 0) -> int:
        return self.machine.memory.allocate(count * dtype.itemsize + offset) + offset

    def vector(self, x: torch.Tensor | None) -> tuple[int, int]:
        """A Parameter: a vector that may be left out, in its own dtype."""
        return (0, 0) if x is None else (self.put(x.reshape(-1)), number_of(x.dtype))

    def matrix(self, x: torch.Tensor, dtype: torch.dtype) -> int:
        """In the tokens' dtype. Where it has another, the kernels convert it, as the bindings have it."""
        if x.dtype == dtype:
            return self.put(x, gpu.offset)
        to = self.room(x.numel(), dtype)
        self.run("convert", self.put(x), x.dtype, to, dtype, x.numel())
        return to

    def run(self, op: str, *values: Any) -> None:
        self.machine.seed = gpu.seed
        self.machine.call(f"ptx_{op}", [gpu.architecture, gpu.processors, *map(word, values)])

    def get(self, at: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        raw = torch.from_numpy(self.machine.memory.get(at, NUMPY[dtype], shape))
        return raw if dtype == torch.float32 else raw.view(dtype)


def _bits(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float32 else torch.uint16


@contextlib.contextmanager
def calling() -> Iterator[Call]:
    call = Call()
    with call.machine.memory.frame():
        yield call


# ----------------------------------------------------------------------------------------------------------------- ops


def rows(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] as [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


def tokens_of(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B, N, C] in the shape and the layout of ``x`` [B, C, H, W]."""
    b, c, h, w = x.shape
    out = torch.empty_like(like(x), dtype=rows.dtype)
    return out.copy_(rows.reshape(b, h, w, c).permute(0, 3, 1, 2))


def sizes(x: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2] * x.shape[3], x.shape[1]


def moments(x: torch.Tensor) -> torch.Tensor:
    batch, positions, channels = sizes(x)
    with calling() as call:
        out = call.room(batch * 2 * channels, torch.float32)
        call.run("moments", call.put(rows(x), gpu.offset), x.dtype, batch, positions, channels, out)
        return call.get(out, torch.float32, batch, 2, channels)


def block_words(
    call: Call, x: torch.Tensor, statistics: torch.Tensor | None, p: dict[str, Any], in_place: bool
) -> list:
    """The arguments of `block`, as `BlockArgs` has them."""
    batch, positions, channels = sizes(x)
    at = call.put(rows(x), gpu.offset)
    found = 0 if statistics is None else call.put(statistics)
    out = at if in_place else call.room(x.numel(), x.dtype, gpu.offset)
    new = found if in_place or not found else call.room(batch * 2 * channels, torch.float32)
    words: list[Any] = [at, out, x.dtype, batch, positions, channels, p["fc1_weight"].shape[0], found, new]
    for name in PARAMETERS:
        if name in MATRICES:
            words.append(call.matrix(p[name], x.dtype))
        elif isinstance(p[name], torch.Tensor | None):
            words += call.vector(p[name])
        elif name != "int8":
            words.append(p[name])
    return words


def block(
    x: torch.Tensor, statistics: torch.Tensor | None, *parameters: Any, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, positions, channels = sizes(x)
    p = dict(zip(PARAMETERS, parameters, strict=True))
    with calling() as call:
        words = block_words(call, x, statistics, p, in_place)
        call.run("block", *words)
        out = tokens_of(call.get(words[1], x.dtype, batch, positions, channels), x)
        if p["per_position"]:
            return out, torch.empty(batch, 2, 0)
        return out, call.get(words[8], torch.float32, batch, 2, channels)


def block_(x: torch.Tensor, statistics: torch.Tensor | None, *parameters: Any) -> None:
    out, new = block(x, statistics, *parameters, in_place=True)
    x.copy_(out)
    if statistics is not None:
        statistics.copy_(new)


def embed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    with_moments: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, inputs, height, width = x.shape
    channels, _, *kernel = weight.shape
    out_size = [(side + 2 * padding - taps) // stride + 1 for side, taps in zip((height, width), kernel, strict=True)]
    with calling() as call:
        # Where it lies, with its own strides and what is between its elements.
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        at = call.put(torch.as_strided(x, (reach,), (1,)))
        out = call.room(batch * channels * out_size[0] * out_size[1], dtype)
        found = call.room(batch * 2 * channels, torch.float32) if with_moments else 0
        call.run(
            "embed", at, x.dtype, batch, inputs, height, width, *x.stride(), call.matrix(rows(weight), dtype),
            *call.vector(bias), dtype, channels, *kernel, stride, padding, *out_size, out, found,
        )  # fmt: skip
        tokens = call.get(out, dtype, batch, *out_size, channels).permute(0, 3, 1, 2)
        return tokens, call.get(found, torch.float32, batch, 2, channels) if found else torch.empty(batch, 2, 0)


def norm(
    x: torch.Tensor,
    statistics: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    per_position: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    batch, positions, channels = sizes(x)
    with calling() as call:
        found = 0 if statistics is None else call.put(statistics)
        out = call.room(x.numel(), dtype)
        call.run(
            "norm", call.put(rows(x), gpu.offset), x.dtype, batch, positions, channels, found, *call.vector(weight),
            *call.vector(bias), eps, per_position, out, dtype,
        )  # fmt: skip
        return tokens_of(call.get(out, dtype, batch, positions, channels), x)


def head(
    x: torch.Tensor,
    statistics: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    fc_weight: torch.Tensor,
    fc_bias: torch.Tensor | None,
    per_position: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    batch, positions, channels = sizes(x)
    classes = len(fc_weight)
    with calling() as call:
        found = 0 if statistics is None else call.put(statistics)
        out = call.room(batch * classes, dtype)
        call.run(
            "head", call.put(rows(x), gpu.offset), x.dtype, batch, positions, channels, classes, found,
            *call.vector(norm_weight), *call.vector(norm_bias), eps, *call.vector(fc_weight.reshape(-1)),
            *call.vector(fc_bias), per_position, out, dtype,
        )  # fmt: skip
        return call.get(out, dtype, batch, classes)


def setting(architecture: int, processors: int) -> Setting:
    return Setting(f"sm_{architecture}-{processors}", lambda: on(architecture=architecture, processors=processors))


SETTINGS = tuple(setting(architecture, processors) for architecture in (80, 90) for processors in (1, 1000))
PTX_CUDA = Target(
    "ptx-cuda",
    {"moments": moments, "embed": embed, "block": block, "block_": block_, "norm": norm, "head": head},
    settings=SETTINGS,
    few=(setting(80, 4), setting(90, 4)),
    one=(setting(90, 4),),
    width=8,
    most_work=6_000_000,
    embeds_channels_last=True,
    why_not=lambda: None if shutil.which("nvcc") else NO_NVCC,
)
TARGETS = {"ptx-cuda": PTX_CUDA}
