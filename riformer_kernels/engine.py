"""``Engine``: a patched model behind fixed shapes, for serving. On a GPU each batch size is one CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import InputError, MemoryLimitError
from .fused import FusedBackbone
from .modules import STATE
from .patching import patch

BATCH_SIZES = (1, 8, 64, 256)
IMAGE_SIZE = 224
_WARM_UP_CALLS = 2


class Engine:
    """Runs batches of any length through a model at a few fixed batch sizes.

    A batch is padded to the next of ``batch_sizes``; one that is larger than the largest is split. An image's result
    does not depend on the batch that it is in, so neither changes a bit of it. On a GPU each batch size has a CUDA
    graph over static buffers, which is replayed; images from the CPU go through pinned memory. On a CPU the model is
    called with the padded batch. Any number of threads may call one engine; they take turns.

    Parameters may change: in-place changes are seen by the graphs, and where a parameter has been replaced, or a hook
    added, the graph is captured anew by the next call.

    Args:
        model: a classifier or backbone that contains a RIFormer, on its device and in evaluation mode. It is patched
            (``riformer_kernels.patch``) unless it is already, and stays patched.
        batch_sizes: the fixed batch sizes, in any order.
        image_size: side of the square images, or (height, width), in pixels.
        channels: of the images.

    Raises:
        InputError: no or non-positive batch sizes, a bad image size.
        PatchError, BackendError, VerificationError: as ``patch``.
        MemoryLimitError: the buffers of a batch size do not fit; the message says how much was asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        image_size: int | tuple[int, int] = IMAGE_SIZE,
        *,
        channels: int = 3,
    ) -> None:
        self.batch_sizes = _checked_batch_sizes(batch_sizes)
        self.image_size = _checked_image_size(image_size)
        self.channels = channels
        self.model = model
        if not any(isinstance(module, FusedBackbone) for module in model.modules()):
            patch(model, image_size=self.image_size)
        self._backbones = [module for module in model.modules() if isinstance(module, FusedBackbone)]
        lead = self._backbones[0].patch_embed.proj.weight
        self.device, self.dtype = lead.device, lead.dtype
        self._modules: list[nn.Module] = []
        self._graphs = _Graphs(self.device) if self.device.type == "cuda" else None
        self._lock = threading.Lock()
        self._slots: dict[int, _Slot] = {}
        with self._lock:
            for size in reversed(self.batch_sizes):  # the largest first: the others reuse its memory
                self._slot(size)

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"Engine(batch_sizes={self.batch_sizes}, image_size={height}x{width}, {self.dtype}, {self.device})"

    def __call__(self, images: torch.Tensor) -> Any:
        """What the model returns for ``images``.

        Args:
            images: [B, channels, height, width], any floating dtype (converted to the model's), on the engine's device
                or on the CPU. B may be 0, or larger than the largest batch size.

        Returns:
            The model's result (a tensor, or a tuple, list or dictionary of such), on the device of ``images``.

        Raises:
            InputError: another rank, dtype, device or image size, or the model has been moved since. The engine stays
                usable after any error.
            MemoryLimitError: out of memory.
        """
        self._check(images)
        with self._lock, torch.no_grad():
            self._check_model()
            if not len(images):
                return self._guarded(0, lambda: self.model(images.to(self.device, self.dtype)))
            largest = self.batch_sizes[-1]
            parts = [self._run(part) for part in images.split(largest)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _run(self, images: torch.Tensor) -> Any:
        count = len(images)
        slot = self._slot(next(size for size in self.batch_sizes if size >= count))
        return self._guarded(slot.size, lambda: slot.run(images))

    def _slot(self, size: int) -> _Slot:
        """The buffers of a batch size, made when they are missing or what they captured no longer holds."""
        graphs = self._graphs
        slot = self._slots.get(size)
        if slot is None or (graphs and slot.fingerprint != _fingerprint(self._modules)):
            self._slots.pop(size, None)
            self._modules = list(self.model.modules()) if graphs else []
            fingerprint = _fingerprint(self._modules)
            images = (self.model, (size, self.channels, *self.image_size), self.device, self.dtype, fingerprint)
            with torch.no_grad():
                slot = self._guarded(size, lambda: _GraphSlot(graphs, *images) if graphs else _Slot(*images))
            self._slots[size] = slot
        return slot

    def _guarded(self, size: int, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            height, width = self.image_size
            raise MemoryLimitError(
                f"out of memory on {self.device} at batch {size}, {height} x {width} pixels, {self.dtype}: {error}. "
                "Use smaller batch_sizes: larger batches are split"
            ) from error

    def _check(self, images: torch.Tensor) -> None:
        height, width = self.image_size
        want = f"images [B, {self.channels}, {height}, {width}]"
        if not isinstance(images, torch.Tensor):
            raise InputError(f"expected {want} as a torch.Tensor, found {type(images).__name__}")
        if images.ndim != 4 or images.shape[1] != self.channels:
            hint = "; add the batch dimension with images.unsqueeze(0)" if images.ndim == 3 else ""
            raise InputError(f"expected {want}, found shape {tuple(images.shape)}{hint}")
        if not images.is_floating_point():
            raise InputError(
                f"expected {want}, found {images.dtype}; convert and normalise: (images.float() - mean) / std"
            )
        found = tuple(images.shape[2:])
        if found != self.image_size:
            larger = "larger than" if found[0] > height or found[1] > width else "not"
            raise InputError(
                f"expected {want}: images of {found[0]} x {found[1]} pixels are {larger} what this engine was built "
                f"for; resize them, or build another with image_size={found}"
            )
        if images.device.type != "cpu" and images.device != self.device:
            raise InputError(f"expected {want} on {self.device} or the CPU, found them on {images.device}")

    def _check_model(self) -> None:
        lead = self._backbones[0].patch_embed.proj.weight
        if (lead.device, lead.dtype) != (self.device, self.dtype):
            raise InputError(
                f"the model is {lead.dtype} on {lead.device} now, and this engine was built for {self.dtype} on "
                f"{self.device}; move it back, or build another engine"
            )
        if not all(isinstance(module, FusedBackbone) for module in self._backbones):
            raise InputError(
                "the model was restored since this engine was built; build another engine, which patches it"
            )


class _Slot:
    """The static input of one batch size, and the model called with it."""

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, fingerprint: tuple
    ) -> None:
        self.model = model
        self.size = shape[0]
        self.fingerprint = fingerprint
        self.images = torch.zeros(shape, dtype=dtype, device=device)

    def run(self, images: torch.Tensor) -> Any:
        self.images[: len(images)].copy_(images)
        return _first(self.model(self.images), len(images), images.device, self.size)


class _Graphs:
    """What the graphs of one engine share: a stream, so that their replays follow each other, and therefore memory."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()


class _GraphSlot(_Slot):
    """The same as a CUDA graph, with a pinned buffer for images from the CPU."""

    def __init__(
        self,
        graphs: _Graphs,
        model: nn.Module,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        fingerprint: tuple,
    ) -> None:
        super().__init__(model, shape, device, dtype, fingerprint)
        self.stream = graphs.stream
        self.staging = torch.empty(shape, dtype=dtype, pin_memory=True)
        self.staged = torch.cuda.Event()
        with torch.cuda.device(device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                # Compiles what patch() has not, and lets lazily made handles be made outside of the capture.
                for _ in range(_WARM_UP_CALLS):
                    model(self.images)
            self.stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=graphs.pool, stream=self.stream):
                self.outputs = model(self.images)

    def run(self, images: torch.Tensor) -> Any:
        count, caller = len(images), torch.cuda.current_stream(self.images.device)
        with torch.cuda.device(self.images.device):
            self.stream.wait_stream(caller)
            with torch.cuda.stream(self.stream):
                if images.device.type == "cpu":
                    self.staged.synchronize()  # the last copy out of the pinned buffer has to be done
                    self.staging[:count].copy_(images)
                    self.images[:count].copy_(self.staging[:count], non_blocking=True)
                    self.staged.record()
                else:
                    self.images[:count].copy_(images)
                    images.record_stream(self.stream)
                self.graph.replay()
                # A copy: the next replay overwrites the static outputs.
                found = tree_map(lambda value: value[:count].clone(), self.outputs)
            caller.wait_stream(self.stream)
            tree_map(lambda value: value.record_stream(caller), found)
            return tree_map(lambda value: value.to(images.device), found)


def _first(outputs: Any, count: int, device: torch.device, size: int) -> Any:
    """The first ``count`` of a result's images; a copy where there are more, so that the padding is let go of."""
    return tree_map(lambda value: (value if count == size else value[:count].clone()).to(device), outputs)


def _joined(parts: list[Any]) -> Any:
    flat = [tree_flatten(part) for part in parts]
    return tree_unflatten(
        [torch.cat(values) for values in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1]
    )


def _fingerprint(modules: list[nn.Module]) -> tuple:
    """What a captured graph depends on besides values. A graph is captured anew when any of it has changed.

    That is where the parameters lie, which submodules there are, and the programs of the backbones. Every call asks, so
    it is taken from a list of modules rather than from the tree.
    """
    children = tuple(chain.from_iterable(module._modules.values() for module in modules))
    tensors = chain.from_iterable(chain(module._parameters.values(), module._buffers.values()) for module in modules)
    programs = tuple(
        module.__dict__[STATE].program_for(module) for module in modules if isinstance(module, FusedBackbone)
    )
    return programs, children, tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)


def _checked_batch_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    try:
        found = tuple(sorted(set(sizes)))
        good = bool(found) and all(isinstance(size, int) and size > 0 for size in found)
    except TypeError:
        found, good = (), False
    if not good:
        raise InputError(f"batch_sizes must be positive integers such as {BATCH_SIZES}, found {sizes!r}")
    return found


def _checked_image_size(size: int | tuple[int, int]) -> tuple[int, int]:
    found = (size, size) if isinstance(size, int) else size
    good = isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(s, int) and s > 0 for s in found)
    if not good:
        raise InputError(f"image_size must be an integer or (height, width), in pixels, found {size!r}")
    return found[0], found[1]
