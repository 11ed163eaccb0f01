"""What a call of ``Engine`` costs in Python, next to the GPU's work: one batch, every image size alike.

    python bench/engine_overhead.py               # microseconds per call for S12 and M48

The graph is the tests' stand-in (``tests/support_stand_in.py``) and computes nothing, and so do streams and events.
What is left is the engine's own Python, and PyTorch's calls that copy a small image and the result. The time that the
driver takes on a machine with a GPU comes on top. "Before the replay" is what the GPU waits for; the rest runs while it
is at work.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from riformer.model import RIFormer

from riformer_kernels import Engine, patch
from riformer_kernels.machine import threads
from riformer_kernels.timing import interleave, percentile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

IMAGE = 32  # so that copying an image takes about a microsecond; a GPU copies by itself
ARCHS = ("s12", "m48")


def measure(arch: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Microseconds of one call at batch 1: images from the CPU and from the GPU, and the parts of the latter."""
    from support_stand_in import stand_in

    with stand_in(), torch.inference_mode(), threads(1):
        model = RIFormer(arch, num_classes=1000, deploy=True).to(dtype).eval()
        patch(model, verify=False, backend="reference")
        engine = Engine(model, (1, 8), IMAGE)
        _do_nothing(engine)
        images = torch.randn((1, 3, IMAGE, IMAGE), dtype=dtype)
        on_gpu = images.contiguous(memory_format=torch.channels_last)
        state = engine._state
        assert state is not None and state.holds(), "the engine captures anew in every call"
        before = _before_replay(engine, on_gpu)
        static, result = torch.empty_like(images), engine(images)
        times = interleave(
            {
                "images on the GPU": lambda: engine(on_gpu),
                "images on the CPU": lambda: engine(images),
                "the comparison of the state": state.holds,
                "PyTorch's copies of image and result": lambda: (static.copy_(on_gpu), result.clone()),
            },
            seconds,
            min_rounds=20,
        )
    found = {name: 1e6 * samples.median for name, samples in times.items()}
    return {**found, "before the replay (images on the GPU)": before}


def _nothing(*_: object) -> None:
    """What the driver is asked for."""


def _do_nothing(engine: Engine) -> None:
    """Graphs and events of the stand-in write down what they are asked for; that is no cost of the engine's."""
    assert engine._graphs is not None
    engine._graphs.done = SimpleNamespace(record=_nothing, synchronize=_nothing)
    for slot in engine._slots.values():
        slot.graph = SimpleNamespace(replay=_nothing)
        slot.staged = SimpleNamespace(record=_nothing, synchronize=_nothing)


def _before_replay(engine: Engine, images: torch.Tensor) -> float:
    """Microseconds from the call to the replay: the median of many calls."""
    slot = engine._slots[1, None]
    taken = []

    class Clock:
        def replay(self) -> None:
            taken.append(time.perf_counter() - start)

    graph, slot.graph = slot.graph, Clock()
    gc.disable()
    try:
        for _ in range(2000):
            start = time.perf_counter()
            engine(images)
    finally:
        gc.enable()
        slot.graph = graph
    return 1e6 * percentile(taken, 0.5)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each arch (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for arch in arguments.arch:
        for name, value in measure(arch, getattr(torch, arguments.dtype), arguments.seconds).items():
            print(f"{arch} {arguments.dtype}: {name}: {value:.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
