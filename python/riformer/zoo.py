"""The ten published checkpoints, how they are called, and how to get one.

Names, URLs and accuracies: mmpretrain 1.2.0, ``configs/riformer/metafile.yml`` (trained on ImageNet-1k, 1000 classes,
training-time form, GroupNorm). The last eight characters of each file's name are the first of its sha256.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .arch import ARCHS, Arch, ArchLike, resolve_arch
from .checkpoint import PathLike, load_checkpoint, load_into
from .model import RIFormer
from .safe_pickle import CheckpointError

__all__ = ["DownloadError", "ZOO", "ZooEntry", "create_model", "download", "find_entry"]

_BASE = "https://download.openmmlab.com/mmclassification/v1/riformer/"
_SOURCE = "mmpretrain model zoo"
_TIMEOUT_S = 30


class DownloadError(CheckpointError):
    """A published checkpoint could not be fetched, or is not the published file; the message says what to do."""


@dataclass(frozen=True)
class ZooEntry:
    """One published checkpoint. ``top1`` and ``top5``: per cent on ImageNet-1k at ``image_size`` pixels."""

    name: str
    arch: str
    image_size: int
    url: str
    top1: float
    top5: float
    aliases: tuple[str, ...]
    source: str = _SOURCE

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def sha256_prefix(self) -> str:
        """The eight hexadecimal digits in the file's name."""
        return re.search(r"-([0-9a-f]{8})\.pth$", self.file_name)[1]  # type: ignore[index]


def _entry(arch: str, size: int, digits: str, top1: float, top5: float) -> ZooEntry:
    aliases: tuple[str, ...]
    if size == 224:
        name, part, aliases = f"riformer-{arch}_in1k", "in1k", (f"riformer-{arch}", arch)
    else:
        # mmpretrain's metafile and registry say ..._in1k-384, its README ..._384_in1k.
        name, part, aliases = f"riformer-{arch}_in1k-{size}", f"in1k-{size}px", (f"riformer-{arch}_{size}_in1k",)
    url = f"{_BASE}riformer-{arch}_32xb128_{part}_20230406-{digits}.pth"
    return ZooEntry(name, arch, size, url, top1, top5, aliases)


ZOO: dict[str, ZooEntry] = {
    entry.name: entry
    for entry in (
        _entry("s12", 224, "6741ce71", 76.90, 93.06),
        _entry("s24", 224, "fdab072a", 80.28, 94.80),
        _entry("s36", 224, "fdfcd3b0", 81.29, 95.41),
        _entry("m36", 224, "2fcb9d9b", 82.57, 95.99),
        _entry("m48", 224, "2b9d1abf", 82.75, 96.11),
        _entry("s12", 384, "145eda4c", 78.29, 93.93),
        _entry("s24", 384, "bafae7ab", 81.36, 95.40),
        _entry("s36", 384, "017ed3c4", 82.22, 95.95),
        _entry("m36", 384, "66a6f764", 83.39, 96.40),
        _entry("m48", 384, "2e874826", 83.70, 96.60),
    )
}


def find_entry(name: str) -> ZooEntry:
    """The published checkpoint called ``name``, in any case; a bare arch ("s12") is the one trained at 224 pixels.

    Both ``riformer-s12_in1k-384`` (mmpretrain's registry) and ``riformer-s12_384_in1k`` (its README) are understood.

    Raises:
        ValueError: there is none of that name.
    """
    wanted = name.strip().lower()
    for entry in ZOO.values():
        if wanted == entry.name or wanted in entry.aliases:
            return entry
    raise ValueError(f"no published checkpoint is called {name!r}; there are {', '.join(ZOO)}")


def create_model(
    name: ArchLike, pretrained: bool = False, num_classes: int = 1000, *, cache_dir: PathLike | None = None,
    progress: bool = True, **options: Any,
) -> RIFormer:  # fmt: skip
    """Build a `RIFormer`, by the name of an arch, of a published checkpoint, or by an arch dict.

    ``pretrained=True`` downloads the published weights (checked against their hash, kept in the cache) and loads them.
    With ``num_classes`` other than 1000 everything but the classifier is loaded and that starts fresh; 0 is a backbone.
    ``options`` go to `RIFormer` (``deploy=True`` folds the weights while loading).

    Raises:
        ValueError: unknown name; a norm other than the weights' (they would load and compute something else).
        DownloadError, CheckpointError: see `download` and `load_into`.
    """
    entry = None
    if isinstance(name, str):
        try:
            entry = find_entry(name)
        except ValueError:
            raise ValueError(
                f"unknown model {name!r}; expected an arch ({', '.join(ARCHS)}) or a published checkpoint "
                f"({', '.join(ZOO)})"
            ) from None
    arch: Arch = resolve_arch(entry.arch if entry else name)
    if not pretrained:
        return RIFormer(arch, num_classes=num_classes, **options)
    if entry is None:
        raise ValueError(f"pretrained=True needs the name of a published checkpoint; found {name!r}. There are "
                         f"{', '.join(ZOO)}")  # fmt: skip
    norm, eps = options.get("norm", "gn"), options.get("norm_eps", 1e-5)
    if (norm, eps) != ("gn", 1e-5):
        raise ValueError(
            f"the published weights were trained with norm='gn', norm_eps=1e-5; found norm={norm!r}, norm_eps={eps!r}. "
            "Leave both out, or use pretrained=False"
        )
    model = RIFormer(arch, num_classes=num_classes, **options)
    load_into(model, load_checkpoint(download(entry.name, cache_dir, progress)), strict_head=num_classes == 1000)
    return model


def download(name: str, cache_dir: PathLike | None = None, progress: bool = True) -> Path:
    """Return the path of a published checkpoint, fetching it if it is not in the cache.

    The cache is ``cache_dir``, by default ``torch.hub.get_dir()/checkpoints`` (set TORCH_HOME to move it). A file put
    there by hand is used. Either way its sha256 must begin with the digits in its name. A partial file never gets the
    final name. ``progress`` shows a bar on a terminal that has rich, otherwise one line; both on stderr.

    Raises:
        ValueError: unknown name.
        DownloadError: offline, an HTTP error, a broken transfer, a wrong hash, or no room to write.
    """
    entry = find_entry(name)
    folder = Path(cache_dir) if cache_dir is not None else Path(torch.hub.get_dir()) / "checkpoints"
    target = folder / entry.file_name
    if target.exists():
        digest = _sha256(target)
        if not digest.startswith(entry.sha256_prefix):
            raise DownloadError(
                f"{target} is not the published file: its sha256 begins with {digest[:8]}, expected "
                f"{entry.sha256_prefix}. Delete it and try again, or get it from {entry.url}"
            )
        return target
    temporary = folder / f".{entry.file_name}.{uuid.uuid4().hex}.part"
    by_hand = f"Without a connection, fetch {entry.url} elsewhere and put it at {target}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = _fetch(entry.url, temporary, progress)
        if not digest.startswith(entry.sha256_prefix):
            raise DownloadError(
                f"what {entry.url} sent is not the published file: its sha256 begins with {digest[:8]}, expected "
                f"{entry.sha256_prefix}. It was thrown away. Something in between may have replaced it. {by_hand}"
            )
        os.replace(temporary, target)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{entry.url} answered {error.code} {error.reason}. {by_hand}") from error
    except urllib.error.URLError as error:
        raise DownloadError(f"cannot reach {entry.url}: {error.reason}. {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"downloading {entry.url} to {target} failed: {error}. {by_hand}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(url: str, path: Path, progress: bool) -> str:
    """Stream ``url`` to ``path``; return its sha256. OSError if it ends before the length that was announced."""
    request = urllib.request.Request(url, headers={"User-Agent": "riformer"})
    digest, received = hashlib.sha256(), 0
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response, path.open("xb") as file:
        announced = response.headers.get("Content-Length")
        total = int(announced) if announced and announced.isdigit() else None
        with _progress(url, total, progress) as advance:
            while block := response.read(1 << 18):
                file.write(block)
                digest.update(block)
                received += len(block)
                advance(len(block))
    if total is not None and received != total:
        raise OSError(f"the connection ended after {received:,} of {total:,} bytes")
    return digest.hexdigest()


@contextlib.contextmanager
def _progress(url: str, total: int | None, wanted: bool) -> Iterator[Callable[[int], None]]:
    name = url.rsplit("/", 1)[-1]
    bar = _rich_bar() if wanted and sys.stderr.isatty() else None
    if bar is None:
        if wanted:
            size = f" ({total / 1e6:.1f} MB)" if total else ""
            print(f"downloading {name}{size} from {url}", file=sys.stderr)
        yield lambda _: None
    else:
        with bar:
            task = bar.add_task(name, total=total)
            yield lambda count: bar.update(task, advance=count)


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
