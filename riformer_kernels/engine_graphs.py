"""CUDA graphs for ``Engine``: one per batch size, over static buffers, replayed on the stream of whoever calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

_WARM_UP_CALLS = 2


def uses_graphs(device: torch.device) -> bool:
    """Whether an engine on ``device`` replays graphs."""
    return device.type == "cuda"


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the CPU that the GPU copies from while the CPU goes on."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def from_cpu(images: torch.Tensor) -> bool:
    """Whether images have to be brought to the GPU."""
    return images.device.type == "cpu"


class Graphs:
    """What the graphs of one engine share: memory, a stream to capture on, and the order of their replays.

    Graphs that share memory must not run at the same time. A replay runs on its caller's stream, so a call on another
    stream than the last one's first lets that stream wait for the end of the last call.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = torch.cuda.device(device)  # one object for all calls: they hold the engine's lock
        with self.on_device:
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
            self.done = torch.cuda.Event()
        self._last: int | None = None

    def after_the_last_call(self) -> Any:
        """The caller's stream; what is put there from now on runs after the last call's work, wherever that was."""
        stream = torch.cuda.current_stream()
        handle = stream.cuda_stream
        if handle != self._last:
            if self._last is not None:
                stream.wait_event(self.done)
            self._last = handle
        return stream

    def wait(self) -> None:
        """Until the GPU has done all work of the calls so far."""
        self.done.synchronize()


class GraphSlot:
    """The buffers of one batch size, and the model as a graph over them.

    Args:
        between: called before the last warm-up call and again after the capture.
    """

    def __init__(
        self,
        graphs: Graphs,
        model: nn.Module,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        between: Callable[[], None],
    ) -> None:
        self.size = shape[0]
        self.graphs = graphs
        self.images = torch.zeros(shape, dtype=dtype, device=device)
        self.staging = pinned(shape, dtype)
        self.staged = torch.cuda.Event()
        self.graph = torch.cuda.CUDAGraph()
        caller = graphs.after_the_last_call()
        # This block puts the caller's stream back where `torch.cuda.graph` does not: it leaves its own stream current
        # when the end of the capture raises.
        with torch.cuda.stream(graphs.stream), _without_cached_casts(device.type):
            graphs.stream.wait_stream(caller)
            # Compiles what patch() has not, and lets lazily made handles be made outside of the capture.
            for call in range(_WARM_UP_CALLS):
                if call == _WARM_UP_CALLS - 1:
                    between()
                model(self.images)
            graphs.stream.synchronize()
            outputs = self._capture(model)
        between()
        self.leaves, self.structure = tree_flatten(outputs)
        self.single = isinstance(outputs, torch.Tensor)

    def _capture(self, model: nn.Module) -> Any:
        """The model's result, static as well.

        The mode ``thread_local`` lets other threads go on loading modules and allocating memory meanwhile.
        """
        raised: BaseException | None = None
        outputs = None
        graphs = self.graphs
        try:
            with torch.cuda.graph(
                self.graph, pool=graphs.pool, stream=graphs.stream, capture_error_mode="thread_local"
            ):
                try:
                    outputs = model(self.images)
                except BaseException as error:
                    raised = error
                    raise
        except BaseException:
            if raised is not None:  # what went wrong, and not that a capture could not be ended after it
                raise raised from None
            raise
        return outputs

    def run(self, images: torch.Tensor) -> Any:
        """The model's result for at most ``size`` images, in memory of its own on the engine's device."""
        count = len(images)
        stream = self.graphs.after_the_last_call()
        whole = count == self.size
        target = self.images if whole else self.images[:count]
        try:
            if from_cpu(images):
                self.staged.synchronize()  # the last copy out of the pinned buffer has to be done
                staging = self.staging if whole else self.staging[:count]
                staging.copy_(images)
                target.copy_(staging, non_blocking=True)
                self.staged.record(stream)
            else:
                target.copy_(images)
            self.graph.replay()
            # Copies: the next replay overwrites the static results.
            if self.single:
                return (self.leaves[0] if whole else self.leaves[0][:count]).clone()
            return tree_unflatten([_copied(leaf, count) for leaf in self.leaves], self.structure)
        finally:
            self.graphs.done.record(stream)


def _copied(leaf: Any, count: int) -> Any:
    return leaf[:count].clone() if isinstance(leaf, torch.Tensor) else leaf


@contextlib.contextmanager
def _without_cached_casts(kind: str) -> Iterator[None]:
    """Autocast keeps casts of weights until it ends. A graph must cast anew: the weights may change, and what is kept
    is freed."""
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False):
        yield
