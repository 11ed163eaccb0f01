"""Models for the commands: from a checkpoint, a published name, or an arch with random parameters.

torch and riformer are imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._output import CliError

if TYPE_CHECKING:
    import torch
    from riformer import CheckpointInfo, RIFormer


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read: tensors, what they are of, and what its file says beside them."""

    path: Path
    state_dict: dict[str, torch.Tensor]
    info: CheckpointInfo
    metadata: dict[str, str]

    @property
    def arch(self) -> str:
        return arch_name(self.info.arch)

    def norm_options(self, norm: str | None) -> dict[str, Any]:
        """``norm`` and ``norm_eps`` for the model: as asked for, else as the metadata says, else RIFormer's own."""
        try:
            eps = float(self.metadata.get("norm_eps", "1e-5"))
        except ValueError:
            raise CliError(f"{self.path}: metadata norm_eps is {self.metadata['norm_eps']!r}, not a number") from None
        kind = norm or self.metadata.get("norm", "gn")
        if kind not in ("gn", "ln"):
            raise CliError(f"{self.path}: metadata norm is {kind!r}; expected gn or ln. Say which with --norm")
        return {"norm": kind, "norm_eps": eps}

    def build(self, norm: str | None = None, **options: Any) -> RIFormer:
        """The model with the checkpoint's weights, in evaluation mode."""
        import riformer

        with bad_values(self.path):
            model = self.info.build(**{**self.norm_options(norm), **options})
        riformer.load_into(model, self.state_dict, strict_head="num_classes" not in options)
        return model.eval()


def arch_name(arch: Any) -> str:
    """ "s12", or what stands in for a name."""
    return arch.name or f"custom (layers {list(arch.layers)}, widths {list(arch.embed_dims)})"


@contextmanager
def bad_values(what: object) -> Iterator[None]:
    """What riformer says about values that a user gave is an error of the input, not of the program."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise CliError(str(error) if not what else f"{what}: {error}") from error


def is_published(name: str) -> bool:
    """Whether ``name`` is the full name of a published checkpoint ("s12" alone is an arch)."""
    import riformer

    try:
        riformer.find_entry(name)
    except ValueError:
        return False
    return name.strip().lower() not in riformer.ARCHS


def published_names() -> str:
    """The names that download, for messages."""
    import riformer

    return ", ".join(riformer.ZOO)


def read(checkpoint: str, which: str = "auto") -> Source:
    """Read a checkpoint file, or download a published one by its name.

    Raises:
        CheckpointError: it cannot be read, is refused, or is not a RIFormer's.
        CliError: neither a file nor a published name.
    """
    import riformer

    path = Path(checkpoint)
    if not path.exists():
        if is_published(checkpoint):
            path = riformer.download(checkpoint)
        elif not path.suffix and "/" not in checkpoint:
            raise CliError(
                f"--checkpoint {checkpoint}: there is no such file, and no published checkpoint of that name; "
                f"expected a .safetensors or .pth file, or one of {published_names()}"
            )
    state_dict = riformer.load_checkpoint(path, which)
    try:
        info = riformer.infer_arch(state_dict)
    except riformer.CheckpointError as error:
        raise CliError(f"{path}: {error}. Give the checkpoint of a RIFormer") from error
    return Source(path, state_dict, info, riformer.read_metadata(path))


def check_arch(source: Source, arch: str | None) -> None:
    """Complain when ``--arch`` names another arch than the checkpoint's."""
    import riformer

    if arch is None:
        return
    with bad_values(None):
        wanted = riformer.resolve_arch(riformer.find_entry(arch).arch if is_published(arch) else arch)
    if not wanted.same_shape(source.info.arch):
        raise CliError(
            f"{source.path} holds arch {source.arch}, and --arch says {arch}. Leave --arch out: a checkpoint tells "
            "its own"
        )


def random_model(arch: str, seed: int, **options: Any) -> RIFormer:
    """A published arch with hard random parameters, in evaluation mode."""
    import riformer

    with bad_values(None):
        model = riformer.create_model(arch, **options)
    return riformer.randomize_(model, seed).eval()


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a model that is computed in ``name``."""
    import torch

    return torch.bfloat16 if name == "int8" else getattr(torch, name)


def compute_dtype(name: str) -> torch.dtype | None:
    """What ``patch`` is given for ``compute_dtype``."""
    import torch

    return torch.int8 if name == "int8" else None


def machine() -> dict[str, Any]:
    """What a measurement or a verification was made on, for documents."""
    import torch

    import riformer_kernels
    from riformer_kernels.machine import cpu_name

    return {
        "riformer_kernels": riformer_kernels.__version__,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def served_by(handle: Any) -> str:
    """Backend and instruction set of a handle's model, such as "cpu (avx512)"."""
    return ", ".join(dict.fromkeys(row.backend for row in handle.report if row.backend)) or "none"
