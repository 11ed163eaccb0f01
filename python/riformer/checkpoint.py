"""Checkpoints of RIFormer: read safely, convert between the two forms, load, write.

A state dict is ``{name: tensor}`` with the names of `riformer.RIFormer`, which are mmpretrain's without ``backbone.``.
The training-time form has ``norm1`` and ``token_mixer.affine`` in each block, the deployed form ``norm_reparam``.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn

from .infer import CheckpointInfo, clean_name, describe, few, infer_arch
from .model import RIFormer, fold_affine
from .safe_pickle import CheckpointError, load_pickle

__all__ = [
    "CheckpointError", "CheckpointInfo", "LoadResult", "infer_arch", "load_checkpoint", "load_into", "read_metadata",
    "save_checkpoint",
]  # fmt: skip

PathLike = Union[str, "os.PathLike[str]"]

_COUNTERS = {"steps", "n_averaged"}


# ---------------------------------------------------------------------------------------------------------- reading


def load_checkpoint(path: PathLike, which: str = "auto") -> dict[str, Tensor]:
    """Read a checkpoint into ``{name: tensor}`` on the CPU, dtypes as stored.

    The file is safetensors, or a ``.pth`` of PyTorch (told by its content, not its name) holding a bare state dict, or
    one under ``state_dict`` or ``ema_state_dict``. ``module.``, ``_orig_mod.`` and ``backbone.`` are taken out of the
    names in any nesting; the step counters of averaged models are dropped.

    ``which``: "auto" takes ``state_dict`` where there is one, else ``ema_state_dict``, else the bare dict. Note that
    mmengine's EMAHook swaps the two when it saves, so that ``state_dict`` already holds the averaged weights.

    Raises:
        CheckpointError: missing, empty, truncated, corrupt, no checkpoint, no such part, something other than tensors
            in it, or a pickle that names anything not allowed; such a pickle is never executed, see `load_pickle`.
        ValueError: an unknown ``which``.
    """
    if which not in ("auto", "state_dict", "ema_state_dict"):
        raise ValueError(f"which must be 'auto', 'state_dict' or 'ema_state_dict'; found {which!r}")
    path, is_safetensors = _checked_file(path)
    content: Any = _read_safetensors(path) if is_safetensors else load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a dict of tensors. If it is a whole model, save "
            "model.state_dict() instead"
        )
    parts = [key for key in ("state_dict", "ema_state_dict") if isinstance(content.get(key), Mapping)]
    if which != "auto" and which not in parts:
        found = few([repr(key) for key in content])
        raise CheckpointError(f"{path} has no {which!r}; it has {found}. Use which='auto'")
    if parts:
        content = content[parts[0] if which == "auto" else which]
    return _clean_state_dict(content, str(path))


def read_metadata(path: PathLike) -> dict[str, str]:
    """The text entries that `save_checkpoint` put beside the tensors; empty for a ``.pth``. Raises CheckpointError."""
    path, is_safetensors = _checked_file(path)
    if not is_safetensors:
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path} is a damaged safetensors file: {error}. Copy or download it again") from error


def _checked_file(path: PathLike) -> tuple[Path, bool]:
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; expected a .safetensors or .pth file in it")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path} (working directory: {Path.cwd()})") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes); expected a .safetensors or .pth file. Copy it again")
    # safetensors: eight bytes of header length, then the header's JSON. A zip begins with PK, a pickle with 0x80.
    return path, head[8:9] == b"{" and not head.startswith(b"PK")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"{path} is a safetensors file; reading it needs: pip install safetensors") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is a damaged safetensors file: {error}. Copy or download it again") from error


def _clean_state_dict(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{where}: entry {key!r} is a {type(value).__name__}, expected names with tensors only; "
                f"found {few([repr(name) for name in content])}"
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise CheckpointError(f"{where}: {key!r} is a sparse or quantised tensor; expected dense ones")
        name = clean_name(key)
        if name in _COUNTERS:
            continue
        if name in origin:
            raise CheckpointError(
                f"{where}: {origin[name]!r} and {key!r} both stand for {name!r}: more than one model is in it. "
                "Save the one that you want by itself"
            )
        origin[name] = key
        result[name] = value.detach()
    if not result:
        raise CheckpointError(f"{where} holds no tensors")
    return result


# ---------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class LoadResult:
    """What `load_into` did: ``folded`` and ``unfolded`` count converted blocks, ``head`` is "loaded", "kept" (the
    model's own), "ignored" (the model has none) or "none" (neither side has one)."""

    folded: int
    unfolded: int
    head: str


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], *, strict_head: bool = True) -> LoadResult:
    """Load a state dict of either form into a model of either form; the model keeps its form.

    Training-time into deployed: the affine is folded (`fold_affine`, in float64, rounded once). Deployed into
    training-time: the folded norm becomes ``norm1`` and the affine gets s = 2, t = 0, so that gamma (s - 1) = gamma'
    and beta (s - 1) + t = beta'; ``2 n - n`` is exact, so this computes the deployed function to the last bit.
    Values are rounded to the model's floating dtype. ``model`` is a `RIFormer` or anything with its parameter names,
    wrapped (``module.``, ``_orig_mod.``) or inside a classifier (``backbone.``).

    All or nothing: names, shapes and dtypes are checked before the first value changes.

    ``strict_head=False``: a ``head.`` that only one side has, or of another size, is no error: the model keeps its own.

    Raises:
        CheckpointError: names missing or left over, other shapes, not floating point, parameters on the meta device.
    """
    given = _clean_state_dict(state_dict, "the state dict")
    own = {clean_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    if any(tensor.is_meta for _, tensor in own.values()):
        raise CheckpointError("the model's parameters are on the meta device; call model.to_empty(device='cpu') first")
    given, folded, unfolded = _convert(given, own)

    head = {name for name in (*own, *given) if name.startswith("head.")}
    fits = all(n in own and n in given and own[n][1].shape == given[n].shape for n in head)
    outcome = "none" if not head else "loaded" if fits else "kept" if any(n in own for n in head) else "ignored"
    skip = head if not strict_head and not fits else set()

    missing = [name for name in own if name not in given and name not in skip]
    unexpected = [name for name in given if name not in own and name not in skip]
    both = [name for name in given if name in own and name not in skip]
    shapes = [
        f"{name}: found {list(given[name].shape)}, expected {list(own[name][1].shape)}"
        for name in both if given[name].shape != own[name][1].shape
    ]  # fmt: skip
    dtypes = [f"{name}: found {given[name].dtype}" for name in both if not given[name].is_floating_point()]
    if missing or unexpected or shapes or dtypes:
        raise CheckpointError(_misfit(own, given, missing, unexpected, shapes, dtypes, head if not fits else set()))
    with torch.no_grad():
        for name in both:
            own[name][1].copy_(given[name])
    return LoadResult(folded, unfolded, outcome)


def _convert(
    given: dict[str, Tensor], own: Mapping[str, tuple[str, Tensor]]
) -> tuple[dict[str, Tensor], int, int]:  # fmt: skip
    """Bring each block of ``given`` into the form that ``own`` has it in; incomplete blocks stay as they are."""
    result, folded, unfolded = dict(given), 0, 0
    train = ("norm1.weight", "norm1.bias", "token_mixer.affine.weight", "token_mixer.affine.bias")
    deployed = ("norm_reparam.weight", "norm_reparam.bias")
    for block in sorted({name.split(".norm2.")[0] for name in own if ".norm2." in name}):
        train_names, deployed_names = ([f"{block}.{part}" for part in parts] for parts in (train, deployed))
        if all(n in own for n in deployed_names) and all(n in result for n in train_names):
            parts = [result[n] for n in train_names]
            dim = own[deployed_names[0]][1].numel()
            shapes = [tuple(part.shape) for part in parts]
            # Anything else is left for the check that follows, which names it.
            if shapes == [(dim,), (dim,), (dim, 1, 1, 1), (dim,)] and all(p.is_floating_point() for p in parts):
                result.update(zip(deployed_names, fold_affine(*parts), strict=True))
                for name in train_names:
                    del result[name]
                folded += 1
        elif all(n in own for n in train_names) and all(n in result for n in deployed_names):
            gamma, beta = (result.pop(n) for n in deployed_names)
            scale = torch.full((gamma.numel(), 1, 1, 1), 2.0, dtype=torch.float64)
            result.update(zip(train_names, (gamma, beta, scale, torch.zeros_like(scale).flatten()), strict=True))
            unfolded += 1
    return result, folded, unfolded


def _misfit(
    own: Mapping[str, tuple[str, Tensor]], given: Mapping[str, Tensor], missing: list[str], unexpected: list[str],
    shapes: list[str], dtypes: list[str], head: set[str],
) -> str:  # fmt: skip
    lines = ["the checkpoint does not fit the model; nothing was changed"]
    for title, names in (("missing", missing), ("not in the model", unexpected), ("other shape", shapes),
                         ("not floating point", dtypes)):  # fmt: skip
        if names:
            lines.append(f"  {title} ({len(names)}): {few(names)}")
    if set(missing) | set(unexpected) | {line.split(":")[0] for line in shapes} <= head and not dtypes:
        found, expected = (
            f"{shape[0]} classes" if (shape := side.get("head.fc.weight")) is not None else "no classifier head"
            for side in ({n: t.shape for n, t in given.items()}, {n: t.shape for n, (_, t) in own.items()})
        )
        lines.append(
            f"  The checkpoint has {found}, the model {expected}. Build the model to match with num_classes=..., or "
            "load everything else with strict_head=False"
        )
    else:
        lines.append(
            f"  The checkpoint looks like {describe(given)}, the model like "
            f"{describe({n: t for n, (_, t) in own.items()})}. infer_arch(state_dict).build() makes a model that fits"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    model_or_state_dict: RIFormer | Mapping[str, Tensor], path: PathLike, *, metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file and return its sha256 (64 hex digits).

    The metadata says arch, form and, when given a `RIFormer`, its norm and eps, which no tensor tells; ``metadata``
    adds to it or overrides it. The same tensors and metadata give the same bytes. The file appears whole or not at
    all (written beside ``path``, then renamed); an existing one is replaced.

    Raises:
        CheckpointError: not a dict of tensors, or the folder cannot be written.
    """
    from safetensors.torch import save

    entries = {"format": "pt"}
    if isinstance(model_or_state_dict, RIFormer):
        model = model_or_state_dict
        eps = next(m.eps for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm)))
        entries |= {"norm": model.norm_type, "norm_eps": repr(eps)}
        model_or_state_dict = model.state_dict()
    tensors = _clean_state_dict(model_or_state_dict, "the state dict")
    try:
        info = infer_arch(tensors)
        entries |= {"arch": info.arch.name or json.dumps(info.arch.as_dict()),
                    "form": "deployed" if info.deploy else "training-time"}  # fmt: skip
    except CheckpointError:
        pass  # Any tensors may be saved; only a RIFormer's are described.
    # Clones: the format has no shared or strided memory.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    blob = _sorted_header(save(tensors, {**entries, **(metadata or {})}))

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(blob).hexdigest()


def _sorted_header(blob: bytes) -> bytes:
    # safetensors writes metadata in a hash map's random order: the same content would get another sha256 each time.
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:8 + length])  # fmt: skip
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[8 + length:]  # fmt: skip
