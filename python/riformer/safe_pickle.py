"""Read PyTorch's pickle checkpoints without ever running what is in them.

``torch.load(weights_only=True)`` always; there is no way to switch it off and nothing falls back to plain pickle.
Checkpoints of mmengine hold a few things besides tensors (log history, numpy numbers, the config). Their names are
allowed, but each stands for an inert object of this file, so neither mmengine nor numpy runs, nor need be installed.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["ALLOWED_NAMES", "CheckpointError", "load_pickle"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is refused, or does not fit the model; the message says what to do."""


class _Inert:
    """Takes the place of any allowed object: accepts every argument and state, keeps nothing."""

    def __new__(cls, *_args: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_args: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class _HistoryBuffer(_Inert):
    pass


class _ConfigDict(_Inert):
    # Older mmengine pickles a ConfigDict item by item, and torch's unpickler sets items on plain dicts only.
    def __new__(cls, *_args: Any) -> Any:
        return OrderedDict()


def _inert(*_args: Any) -> _Inert:
    return _Inert()


def _getattr(owner: Any, name: Any) -> None:
    # A HistoryBuffer names its own statistics methods this way. Nothing is looked up.
    if owner is not _HistoryBuffer:
        raise pickle.UnpicklingError(f"builtins.getattr on {owner!r} ({name!r})")


_ALLOWED: dict[str, Any] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _HistoryBuffer,
    "mmengine.config.config.ConfigDict": _ConfigDict,
    "builtins.getattr": _getattr,
    "numpy.ndarray": _Inert,
    "numpy.dtype": _Inert,
    **{f"numpy.{core}.multiarray.{name}": _inert for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
}
ALLOWED_NAMES: tuple[str, ...] = tuple(sorted(_ALLOWED))
"""What a checkpoint may name beyond tensors and plain containers. (builtins.getattr only as HistoryBuffer uses it.)"""

# torch's list of allowed names is one for the process: a load that ends must not take it from one still running.
_lock = threading.Lock()


def load_pickle(path: Path) -> Any:
    """Return the object in a ``.pth`` file (zip or legacy format), tensors on the CPU, allowed extras as inert objects.

    Raises:
        CheckpointError: the file names anything that is not allowed (the message says what; it is not executed), or
            is truncated, corrupt or no checkpoint.
    """
    with _lock, torch.serialization.safe_globals([(obj, name) for name, obj in _ALLOWED.items()]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        # Damaged files surface as almost anything: RuntimeError, EOFError, KeyError, struct.error, ...
        except Exception as error:
            refused = _refused_names(path)
            if isinstance(error, pickle.UnpicklingError) and "builtins.getattr on " in str(error):
                refused = sorted({*refused, "builtins.getattr"})
            if refused:
                raise CheckpointError(
                    f"refused to load {path}: it names {', '.join(refused)}, which is neither a tensor nor a plain "
                    "container; nothing in it was executed. If you trust its origin, extract the weights where it was "
                    "made: torch.save(model.state_dict(), ...) or safetensors.torch.save_file(...)"
                ) from None
            raise CheckpointError(
                f"cannot read {path} as a PyTorch checkpoint: it is truncated, corrupt or something else "
                f"({_short(error)}). Copy or download it again and compare its size and sha256"
            ) from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    # torch's advice to switch weights_only off is not for users of this function.
    text = re.split(r"In PyTorch 2\.6|\. This is an internal", lines[0])[0] if lines else ""
    return f"{type(error).__name__}: {text[:200].strip()}" if text.strip() else type(error).__name__


def _refused_names(path: Path) -> list[str]:
    """Names of the globals in the file's pickles that are not allowed, read from its opcodes without unpickling."""
    from torch import _weights_only_unpickler as unpickler

    allowed = {*unpickler._get_allowed_globals(), *unpickler._get_user_allowed_globals()}
    try:
        found = {name for data in _pickles(path) for name in _globals(data)}
    except (OSError, zipfile.BadZipFile, KeyError, EOFError, RuntimeError, NotImplementedError):
        return []
    return sorted(found - allowed)


def _pickles(path: Path) -> Iterator[bytes]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.rsplit("/", 1)[-1] == "data.pkl":
                    yield archive.read(name)
    else:
        yield path.read_bytes()


def _globals(data: bytes) -> Iterator[str]:
    position, end = 0, 0
    strings: list[str] = []
    while position == 0 or data[position:position + 1] == b"\x80":  # fmt: skip
        try:
            for opcode, argument, at in pickletools.genops(data[position:]):
                if opcode.name in ("GLOBAL", "INST") and argument is not None:
                    yield _python3_name(*argument.split(" ", 1))
                elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    yield _python3_name(*strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
                end = (at or 0) + 1
        # The tensors' bytes follow the last pickle of the legacy format.
        except Exception:
            return
        position += end


def _python3_name(module: str, name: str) -> str:
    from torch._utils import IMPORT_MAPPING, NAME_MAPPING

    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
