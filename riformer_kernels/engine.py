"""``Engine``: a patched model behind fixed shapes, for serving. On a GPU each batch size is one CUDA graph."""

from __future__ import annotations

import bisect
import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .engine_graphs import Graphs, GraphSlot, uses_graphs
from .errors import InputError, MemoryLimitError
from .fused import FusedBackbone
from .graph_state import GraphState
from .patching import patch

BATCH_SIZES = (1, 8, 64, 256)
IMAGE_SIZE = 224


class Engine:
    """Runs batches of any length through a model at a few fixed batch sizes.

    A batch is padded to the next of ``batch_sizes``; one that is larger than the largest is split. An image's result
    does not depend on the batch that it is in, so neither changes a bit of it. On a GPU each batch size has a CUDA
    graph over static buffers, which is replayed; images from the CPU go through pinned memory. On a CPU the model is
    called with the padded batch. Any number of threads may call one engine; they take turns.

    Parameters may change: in-place changes are seen by the graphs. Where a parameter, a module, a hook or an attribute
    has been replaced, or autocast is another, the next call captures the graph anew. That is compared while the GPU is
    at work (``graph_state``): a graph is replayed first, and once more if it turns out to be out of date. Hooks
    that are there run while a graph is captured, and not when it is replayed.

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
        self._shape = torch.Size((channels, *self.image_size))
        self._kind = self.device.type
        self._devices = (torch.device("cpu"), self.device)
        self._lock = threading.Lock()
        self._graphs = Graphs(self.device) if uses_graphs(self.device) else None
        self._slots: dict[tuple[int, Any], Any] = {}
        self._state: GraphState | None = None
        if self._graphs is not None:
            # Memory that is freed while a replay uses it could be handed out again.
            weakref.finalize(self, self._graphs.wait).atexit = False
        with self._lock, self._graphs.on_device if self._graphs else contextlib.nullcontext():
            for size in reversed(self.batch_sizes):  # the largest first: the others reuse its memory
                self._slot(size, self._autocast())

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
        if images.requires_grad:
            images = images.detach()
        graphs = self._graphs
        if graphs is None or not len(images):
            return self._called(images)
        with self._lock, graphs.on_device:
            before = self._state
            found = self._run(images)
            # The GPU is at work now. What it computes counts unless a graph turns out to be of the model before a
            # change, also where a missing graph was captured after the change and this batch took both.
            state = self._state
            if state is None or state is not (before or state) or not state.holds():
                self._forget()
                self._check_model()
                found = self._run(images)
        return found if images.device == self.device else _moved(found, images.device)

    def _called(self, images: torch.Tensor) -> Any:
        """The same by calls of the model."""
        with self._lock, torch.no_grad():
            self._check_model()
            if not len(images):
                empty = images.to(self.device, self.dtype)
                return _moved(self._guarded(0, lambda: self.model(empty)), images.device)
            return self._run(images)

    def _run(self, images: torch.Tensor) -> Any:
        sizes, count = self.batch_sizes, len(images)
        if count > sizes[-1]:
            return _joined([self._run(part) for part in images.split(sizes[-1])])
        key = sizes[bisect.bisect_left(sizes, count)], self._autocast()
        slot = self._slots.get(key) or self._slot(*key)
        try:
            return slot.run(images)
        except RuntimeError as error:
            if _out_of_memory(error):
                raise self._too_large(slot.size, error) from error
            raise

    def _autocast(self) -> Any:
        """The dtype of autocast, None where it is off: a graph keeps the casts that were captured."""
        on = self._graphs is not None and torch.is_autocast_enabled(self._kind)
        return torch.get_autocast_dtype(self._kind) if on else None

    def _slot(self, size: int, autocast: Any) -> Any:
        """The buffers of a batch size, made when they are missing. All graphs are of the model in one state."""
        slot = self._slots.get((size, autocast))
        if slot is None:
            shape = (size, self.channels, *self.image_size)
            # Buffers made in inference mode could not be written outside of it.
            with torch.inference_mode(False), torch.no_grad():
                slot = self._guarded(size, lambda: self._made(shape))
            self._slots[size, autocast] = slot
        return slot

    def _made(self, shape: tuple[int, ...]) -> Any:
        if self._graphs is None:
            return _Slot(self.model, shape, self.device, self.dtype)
        if self._state is not None and not self._state.holds():
            self._forget()
        self._check_model()
        seen: list[GraphState] = []
        record = lambda: seen.append(GraphState(self.model, *seen[:1]))  # noqa: E731
        slot = GraphSlot(self._graphs, self.model, shape, self.device, self.dtype, record)
        if self._state is None:
            self._state = seen[1]
        return slot

    def _forget(self) -> None:
        """Drop every graph, when the GPU has done with them."""
        assert self._graphs is not None
        self._graphs.wait()
        self._slots.clear()
        self._state = None

    def _guarded(self, size: int, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            if _out_of_memory(error):
                raise self._too_large(size, error) from error
            raise

    def _too_large(self, size: int, error: RuntimeError) -> MemoryLimitError:
        height, width = self.image_size
        return MemoryLimitError(
            f"out of memory on {self.device} at batch {size}, {height} x {width} pixels, {self.dtype}: {error}. "
            "Use smaller batch_sizes: larger batches are split"
        )

    def _check(self, images: torch.Tensor) -> None:
        height, width = self.image_size
        if (
            isinstance(images, torch.Tensor)
            and images.shape[1:] == self._shape
            and images.is_floating_point()
            and images.device in self._devices
        ):
            return
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

    def __init__(self, model: nn.Module, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.size = shape[0]
        self.images = torch.zeros(shape, dtype=dtype, device=device)

    def run(self, images: torch.Tensor) -> Any:
        count = len(images)
        self.images[:count].copy_(images)
        found = self.model(self.images)
        if count < self.size:  # copies, so that the padding is let go of
            found = tree_map(lambda value: value[:count].clone(), found)
        return _moved(found, images.device)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _moved(found: Any, device: torch.device) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, found)


def _joined(parts: list[Any]) -> Any:
    flat = [tree_flatten(part) for part in parts]
    return tree_unflatten(
        [torch.cat(values) for values in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1]
    )


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
