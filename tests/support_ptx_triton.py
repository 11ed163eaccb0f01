"""The Triton kernels as ops on CPU tensors: the PTX that Triton's compiler makes of each launch is interpreted.

The launchers run as they are. Every launch is compiled for the architecture that is asked for and run at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from support_ptx import parser
from support_ptx.launch import Launch
from support_ptx.memory import GlobalMemory
from support_ptx.syntax import Module
from support_target import Setting, Target
from triton.backends.compiler import GPUTarget

from riformer_kernels import ops
from riformer_kernels.backends import triton as backend
from riformer_kernels.backends.triton import _launch, ahead

assert not _launch.INTERPRETED, "TRITON_INTERPRET=1: interpreted kernels cannot be compiled"


@dataclass(frozen=True)
class Code:
    """One launch's kernel as Triton compiled it."""

    text: str
    module: Module
    name: str
    warps: int
    shared: int


_compiled: dict[tuple, Code] = {}
# What a test does to the PTX of the kernels before they run, and the kernels that ran since the process began.
changed: ContextVar[Callable[[str, str], str] | None] = ContextVar("changed", default=None)
used: set[tuple[str, int, str]] = set()


def code_of(text: str, warps: int, shared: int) -> Code:
    module = parser.parse(text)
    (name,) = module.kernels.names()
    return Code(text, module, name, warps, shared)


def without_machine_code(backend: object = None, stages: dict | None = None, *rest: object) -> tuple[str, str] | None:
    """Leaves out the last stage of Triton's compiler, which takes nearly half of the time. Called without arguments it
    names itself for the compiler's cache."""
    if stages is None:
        return "without machine code", "without machine code"
    stages["cubin"] = lambda source, metadata: b""
    return None


def compiled(launch: _launch.Launch, architecture: int) -> Code:
    source = ahead.source(launch)
    key = (source.hash(), architecture, launch.settings["num_warps"])
    if key not in _compiled:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.add_stages_inspection_hook = without_machine_code
            found = triton.compile(
                source,
                target=GPUTarget("cuda", architecture, 32),
                options={"num_warps": launch.settings["num_warps"], "enable_fp_fusion": True},
            )
        _compiled[key] = code_of(found.asm["ptx"], launch.settings["num_warps"], found.metadata.shared)
    return _compiled[key]


def packed(code: Code, values: list[Any]) -> bytes:
    """The kernel's parameters. What Triton adds behind the launch's own (pointers to scratch memory) is zero."""
    data = b""
    for i, param in enumerate(code.module.kernels[code.name].params):
        data = data.ljust((len(data) + param.align - 1) // param.align * param.align, b"\0")
        value = values[i] if i < len(values) else 0
        if isinstance(value, float):
            data += struct.pack("<f", value)
        else:
            data += int(value).to_bytes(param.size, "little", signed=value < 0)
    return data


def bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    """A view of a tensor's memory."""
    count = storage.nbytes()
    return (
        np.frombuffer((ctypes.c_uint8 * count).from_address(storage.data_ptr()), np.uint8)
        if count
        else np.empty(0, np.uint8)
    )


def run(launch: _launch.Launch, architecture: int, seed: int) -> None:
    """The launch, on copies of all memory that its arguments lie in. What it writes is copied back."""
    code, signature = compiled(launch, architecture), ahead.source(launch).signature
    name = launch.kernel.__name__.strip("_")
    used.add((name, architecture, next((v for v in signature.values() if v in ("*bf16", "*fp16")), "*fp32")))
    if change := changed.get():
        text = change(name, code.text)
        code = code if text is code.text else code_of(text, code.warps, code.shared)
    memory, places = GlobalMemory(1 << 20), {}
    names = list(launch.kernel.arg_names)
    arguments = dict(zip(names, launch.arguments, strict=False)) | {
        k: v for k, v in launch.settings.items() if k in names
    }
    values = []
    for argument in names:
        value = arguments[argument]
        if signature[argument] == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            raw = bytes_of(value.untyped_storage())
            at, _ = places.setdefault(value.untyped_storage().data_ptr(), (memory.put(raw), raw))
            value = at + value.storage_offset() * value.element_size()
        values.append(value)
    grid, threads = (launch.programs, 1, 1), (32 * code.warps, 1, 1)
    Launch(code.module, code.name, grid, threads, code.shared, packed(code, values), memory, seed=seed).run()
    for at, raw in places.values():
        raw[...] = memory.get(at, np.uint8, raw.shape)


class Executed(list):
    """Stands in for the list of recorded launches: what is appended runs."""

    def __init__(self, architecture: int, seed: int) -> None:
        super().__init__()
        self.architecture, self.seed = architecture, seed

    def append(self, launch: _launch.Launch) -> None:
        run(launch, self.architecture, self.seed)
        super().append(launch)


@contextlib.contextmanager
def on(architecture: int, seed: int = 0) -> Iterator[None]:
    """Launches run as on a GPU of that architecture. Memory that the launchers allocate holds NaN until written."""
    token = _launch._recording.set(_launch._Recording(architecture, Executed(architecture, seed)))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        _launch._recording.reset(token)


SETTINGS = tuple(Setting(f"sm_{number}", lambda number=number: on(number)) for number in (80, 90))
PTX_TRITON = Target(
    "ptx-triton",
    {name: backend.launcher(name) for name in ops.ALL},
    settings=SETTINGS,
    few=SETTINGS,
    one=SETTINGS[-1:],
    most_work=6_000_000,
    embeds_channels_last=True,
)
TARGETS = {"ptx-triton": PTX_TRITON}
