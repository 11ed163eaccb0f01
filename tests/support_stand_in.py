"""A stand-in for ``torch.cuda`` on a machine without a GPU: what drives a GPU is tested with it, not what runs on one.

Everything lies on the CPU and is done at once. A captured graph keeps the ops with the memory that they used, as a real
one keeps addresses, and a replay repeats them there: a parameter that has been replaced since is not seen. Streams and
events do nothing but write down what was asked of them. Errors can be planned (``Log.failures``).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from riformer_kernels import engine, engine_graphs

PROPERTIES = SimpleNamespace(name="stand-in", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37)


class Log:
    """What was asked of the stand-in, in order, and the errors that it is to raise.

    Attributes:
        events: (what, of whom) pairs, such as ("replay", a graph).
        failures: an error by the name of the method that raises it, once.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.failures: dict[str, BaseException] = {}

    def add(self, what: str, whom: Any = None) -> None:
        self.events.append((what, whom))
        if self.failures and (error := self.failures.pop(what, None)) is not None:
            raise error

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.events)


class _Recorder(TorchDispatchMode):
    """Keeps every op with the memory of its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kept, kept_kwargs = tree_map(_alias, (args, kwargs))
        found = func(*args, **kwargs)
        results = tree_map(_alias, found)

        def repeat() -> None:
            again = func(*kept, **kept_kwargs)
            tree_map(_write, results, again)

        self.calls.append(repeat)
        return found


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _write(target: Any, value: Any) -> None:
    if isinstance(target, torch.Tensor) and target.data_ptr() != value.data_ptr():
        target.copy_(value)


class StandIn:
    """The classes and functions that stand in for those of ``torch.cuda``, around one log."""

    def __init__(self, log: Log) -> None:
        here = threading.local()
        handles = iter(range(1, 1 << 30))

        class Stream:
            def __init__(self) -> None:
                self.cuda_stream = next(handles)

            def wait_stream(self, other: Stream) -> None:
                log.add("wait_stream", (self, other))

            def wait_event(self, event: Event) -> None:
                log.add("wait_event", (self, event))

            def synchronize(self) -> None:
                log.add("synchronize", self)

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at = 0.0

            def record(self, stream: Stream | None = None) -> None:
                log.add("record", (self, stream))
                self.at = time.perf_counter()

            def synchronize(self) -> None:
                log.add("event.synchronize", self)

            def elapsed_time(self, later: Event) -> float:
                return 1e3 * (later.at - self.at)

        class CUDAGraph:
            def __init__(self) -> None:
                self.recorder = _Recorder()

            def capture_begin(self, mode: str) -> None:
                log.add("capture_begin", mode)
                self.recorder.__enter__()

            def capture_end(self) -> None:
                self.recorder.__exit__(None, None, None)
                log.add("capture_end", self)

            def replay(self) -> None:
                log.add("replay", self)
                with torch.no_grad(), torch.autocast("cpu", enabled=False):  # what was captured has its casts
                    for call in self.recorder.calls:
                        call()

        default = Stream()

        @contextlib.contextmanager
        def stream(wanted: Stream) -> Iterator[None]:
            before = current_stream()
            here.stream = wanted
            try:
                yield
            finally:
                here.stream = before

        def current_stream(device: Any = None) -> Stream:
            return getattr(here, "stream", default)

        class graph:  # its name in torch.cuda
            """As torch's own, also in what it leaves behind when the end of a capture raises."""

            def __init__(
                self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
            ) -> None:
                self.cuda_graph, self.mode = cuda_graph, capture_error_mode
                self.context = torch.cuda.stream(stream or Stream())

            def __enter__(self) -> None:
                self.context.__enter__()
                self.cuda_graph.capture_begin(self.mode)

            def __exit__(self, *error: object) -> None:
                self.cuda_graph.capture_end()
                self.context.__exit__(None, None, None)

        class device:
            def __init__(self, wanted: Any) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *error: object) -> None:
                pass

        self.names: dict[str, Any] = {
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream,
            "current_stream": current_stream, "device": device, "graph_pool_handle": object,
            "synchronize": lambda *_: log.add("synchronize"), "empty_cache": lambda: None,
            "memory_allocated": lambda: 0, "max_memory_allocated": lambda: 1 << 20,
            "reset_peak_memory_stats": lambda: None, "get_device_properties": lambda index: PROPERTIES,
        }  # fmt: skip


@contextlib.contextmanager
def stand_in() -> Iterator[Log]:
    """Inside, an ``Engine`` on the CPU works as on a GPU. Images come "from the CPU" unless they are channels_last."""
    log = Log()
    changes: list[tuple[Any, str, Any]] = [(torch.cuda, name, value) for name, value in StandIn(log).names.items()]
    changes += [
        (engine, "uses_graphs", lambda device: True),
        (engine_graphs, "pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype)),
        (engine_graphs, "from_cpu", lambda images: images.is_contiguous()),
    ]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in changes]
    for holder, name, value in changes:
        setattr(holder, name, value)
    try:
        yield log
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)
