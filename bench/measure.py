"""One measurement as rows of plain data: the model against its peers, an op against its eager form, the ceilings.

A row is a flat dict of JSON values, the same keys for every peer of a kind; what was not measured is None, and
``reason`` says why. ``ratio`` is the speed of ours over that of the row's peer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import digit_images
import isa
import op_cases
import peers
import peers_int8
import riformer
import torch
from machine import Elsewhere
from memory import Memory, peak_memory
from peers import OURS
from subject import Subject, random_images, random_model
from verdict import verdict
from worker import Worker, WorkerError, take_turns

from riformer_kernels import numerics, timing
from riformer_kernels.backends import cpu
from riformer_kernels.timing import Samples

Progress = Callable[[str], None]
CEILING_SIDE = 2048
CEILING_NOTE = "rate of the library's own matrix product (torch.matmul), not a hardware peak"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------- rows


def time_columns(samples: Samples | None, ours: Samples | None, items: int, elsewhere: float | None) -> dict[str, Any]:
    """Time, rate and ratio columns; None without samples. ``elsewhere``: see `machine.Elsewhere`."""
    keys = (
        "rounds", "ms", "ms_p20", "ms_p80", "ms_best", "spread", "images_per_s", "images_per_s_p20", "images_per_s_p80",
        "ratio", "ratio_p20", "ratio_p80", "verdict", "elsewhere",
    )  # fmt: skip
    found: dict[str, Any] = dict.fromkeys(keys)
    if samples is None:
        return found
    found["rounds"] = samples.rounds
    found["spread"], found["elsewhere"] = samples.spread, elsewhere
    for key in ("median", "p20", "p80", "best"):
        found["ms" if key == "median" else f"ms_{key}"] = 1e3 * getattr(samples, key)
    rates = samples.per_second(items)
    found["images_per_s"], found["images_per_s_p20"], found["images_per_s_p80"] = rates
    if ours is not None and ours is not samples:
        ratio = timing.ratio(ours, samples)
        found["ratio"], found["ratio_p20"], found["ratio_p80"] = ratio.median, ratio.p20, ratio.p80
        found["verdict"] = verdict(ours, samples, elsewhere)
    return found


def error_columns(ratios: numerics.ErrorRatios | None) -> dict[str, Any]:
    """Errors against float64, and as multiples of eager PyTorch's."""
    found: dict[str, Any] = {}
    for name in ("max", "rms", "channel", "position"):
        found[f"error_{name}"] = None if ratios is None else getattr(ratios.ours, name)
        found[f"error_ratio_{name}"] = None if ratios is None else getattr(ratios, name)
    return {**found, "error_passed": None if ratios is None else ratios.passed}


def rate_columns(flop: int, seconds: float | None, ceiling: float | None) -> dict[str, Any]:
    """Arithmetic rate of the matrix products, and its share of a measured ceiling (FLOP/s)."""
    per_second = flop / seconds if flop and seconds else None
    return {
        "gflop_per_s": None if per_second is None else per_second / 1e9,
        "ceiling_share": per_second / ceiling if per_second is not None and ceiling else None,
    }


# ------------------------------------------------------------------------------------------------------------ model


def float_subject(arch: Any, size: int, batch: int, dtype: torch.dtype) -> Subject:
    return Subject(random_model(arch, dtype), random_images(batch, size, dtype))


def int8_subject(arch: Any, size: int, batch: int) -> Subject:
    """Parameters and images are rounded to bfloat16, so that eager bfloat16's error is that of its arithmetic alone."""
    x = digit_images.held_out(batch, size).bfloat16().float()
    return Subject(random_model(arch, torch.bfloat16).float(), x, int8=True)


def model(
    arch: Any,
    size: int,
    batch: int,
    dtype: torch.dtype,
    *,
    seconds: float,
    names: Sequence[str] | None = None,
    memory: bool = True,
    ceiling: float | None = None,
    limit: str | None = None,
    progress: Progress = lambda text: None,
) -> list[dict[str, Any]]:
    """The patched model against its peers, each in a worker of its own, in turns; one row each, ours first.

    With ``torch.int8`` as dtype everybody quantises the same float32 model, see `peers_int8`.

    Args:
        arch: a name, or a dict in mmpretrain's form.
        size: side of the images in pixels.
        seconds: of measuring, for each peer.
        names: of the peers (``peers.names()``), ours first; default all.
        memory: whether to measure the memory of ours and eager, each in its own process.
        ceiling: FLOP/s for ``ceiling_share``.
        limit: the instruction set that nobody may exceed (`isa.LIMITS`); those that cannot be kept to it get a reason.
        progress: gets a line before each step.

    Raises:
        BackendError: the machine lacks ``limit``.
        AssertionError, WorkerError: the patched model's numbers are off, or it does not run; there is no timing then.
        ImportError: the images for int8 are not there.
    """
    isa.check(limit)
    int8 = dtype == torch.int8
    subject = int8_subject(arch, size, batch) if int8 else float_subject(arch, size, batch, dtype)
    names = list(names or peers.names(int8=int8))
    progress("float64 and eager for the error figures")
    judge = peers.Judge(subject)
    reasons: dict[str, str] = {}
    if int8 and OURS in names and (refusal := peers_int8.not_offered(subject.model)):
        reasons[OURS] = refusal
    ratios: dict[str, numerics.ErrorRatios] = {}
    facts: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subject.save(folder / peers.SUBJECT, arch)
        torch.save(judge.inputs, folder / peers.INPUTS)
        workers: dict[str, Worker] = {}
        for name in names:
            if name in reasons:
                continue
            progress(f"building {name}")
            if limit is not None and name in isa.UNLIMITED:
                reasons[name] = f"cannot be limited to {limit}: {isa.UNLIMITED[name]}"
                continue
            arguments = {"folder": str(folder), "name": name, "limit": limit}
            # An empty cache: an earlier run may have chosen its fastest kernels while the machine was busy.
            environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), **isa.environment(limit)}
            try:
                worker = Worker(
                    name, "peers:serve", arguments, threads=torch.get_num_threads(), environment=environment
                )
            except WorkerError as error:
                if name == OURS:
                    raise
                reasons[name] = str(error)
                continue
            workers[name] = stack.enter_context(worker)
            facts[name] = worker.facts
            ratios[name] = judge.ratios(name, torch.load(folder / f"{name}.pt", weights_only=True))
        times: dict[str, Samples] = {}
        elsewhere = None
        while workers and not times:
            progress(f"timing {len(workers)} peers")
            try:
                times, elsewhere = take_turns(workers, seconds * len(workers))
            except WorkerError as error:
                if error.name == OURS:
                    raise
                reasons[error.name] = str(error)
                workers.pop(error.name).close()
    memories = {
        name: _memory(arch, size, batch, dtype, name, progress) for name in peers.MEASURED if memory and name in names
    }
    flop = 2 * batch * riformer.count_macs(subject.model, size, count="products")
    common = {
        "kind": "model", "arch": arch if isinstance(arch, str) else "custom", "size": size, "batch": batch,
        "dtype": dtype_name(dtype), "device": "cpu", "isa": limit or cpu.isa_status()["chosen"], "isa_limit": limit,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    return [
        {
            **common,
            "peer": name,
            "form": peers.factories(int8)[name][0],
            "detail": facts.get(name, {}).get("detail"),
            "reason": reasons.get(name),
            **time_columns(times.get(name), times.get(OURS), batch, elsewhere),
            **rate_columns(flop, times[name].median if name in times else None, ceiling),
            **error_columns(ratios.get(name)),
            **_memory_columns(memories, name),
        }
        for name in names
    ]


def _memory(arch: Any, size: int, batch: int, dtype: torch.dtype, name: str, progress: Progress) -> Memory:
    progress(f"memory of {name}")
    arguments = {"arch": arch, "size": size, "dtype": dtype_name(dtype), "name": name}
    return peak_memory("peers:memory_subject", arguments, batch, threads=torch.get_num_threads())


def _memory_columns(memories: Mapping[str, Memory], name: str) -> dict[str, Any]:
    """Extra peak memory, and that of ours over it."""
    if name not in memories:
        return dict.fromkeys(("extra_memory_bytes", "memory_ratio", "memory_method", "memory_reason"))
    found, ours = memories[name], memories[OURS].extra_bytes
    known = name != OURS and ours is not None and found.extra_bytes
    return {
        "extra_memory_bytes": found.extra_bytes,
        "memory_ratio": ours / found.extra_bytes if known else None,
        "memory_method": found.method,
        "memory_reason": found.reason,
    }


def best_peer(rows: list[dict[str, Any]], form: str) -> dict[str, Any] | None:
    """The row of the fastest peer of a form, or None."""
    others = [
        row
        for row in rows
        if row["peer"] not in (OURS, peers_int8.OURS_BFLOAT16) and row["form"] == form and row["ms"] is not None
    ]
    return min(others, key=lambda row: row["ms"], default=None)


def extra_info(ours: dict[str, Any], others: dict[str, dict[str, Any]], best: str) -> dict[str, Any]:
    """For pytest-benchmark's ``extra_info``: the row of ours, and the ratio to each peer.

    ``ratio`` is that to the peer called ``best``.
    """
    found = {key: value for key, value in ours.items() if value is not None}
    for key in ("ratio", "ratio_p20", "ratio_p80", "verdict"):
        found[key] = others[best][key]
    found["ratio_to"] = best
    found["peers"] = {
        name: {key: row[key] for key in ("ms", "ratio", "ratio_p20", "ratio_p80", "verdict", "reason")}
        for name, row in others.items()
    }
    return found


# --------------------------------------------------------------------------------------------------------------- op


def op(case: op_cases.OpCase, *, seconds: float, ceiling: float | None = None) -> list[dict[str, Any]]:
    """One op against its eager form in both layouts; the numbers are asserted first.

    ``bytes`` are the least that has to be moved (input, output and parameters, once), ``flop_per_byte`` is therefore
    the highest arithmetic intensity that the op can have; ``stage`` and ``times`` say what of S12 at 224 px it is.

    Raises:
        AssertionError: the numbers are off.
    """
    built = op_cases.build(case)
    ratios = built.check()
    x, moments = built.inputs()
    calls: dict[str, Callable[[], object]] = {OURS: lambda: built.ours(x, moments), **built.eager(x)}
    with torch.inference_mode():
        size = built.bytes(built.ours(x, moments))
        with Elsewhere() as elsewhere:
            times = timing.interleave(calls, seconds * len(calls))
    common = {
        "kind": "op", "op": case.op, "shape": list(case.shape), "batch": case.batch, "dtype": dtype_name(case.dtype),
        "device": x.device.type, "backend": built.backend.name, "isa": built.backend.detail(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    return [
        {
            **common,
            "peer": name,
            "reason": None,
            **time_columns(samples, times[OURS], case.batch, elsewhere.share),
            **rate_columns(built.flop, samples.median, ceiling),
            "gbyte_per_s": size / samples.median / 1e9 if name == OURS else None,
            "stage": case.stage,
            "times": case.times,
            "flop": built.flop,
            "bytes": size,
            "flop_per_byte": built.flop / size,
            **error_columns(ratios if name == OURS else None),
        }
        for name, samples in times.items()
    ]


# --------------------------------------------------------------------------------------------------------- ceilings


def matmul_ceilings(
    dtypes: tuple[torch.dtype, ...], *, seconds: float, side: int | None = None
) -> list[dict[str, Any]]:
    """The rate of a square ``torch.matmul`` in each dtype, with the threads that are set: what the library reaches.

    It is no hardware peak (`peak.py` measures that), but what a user who trusts the library would take for one.
    """
    side = side or CEILING_SIDE
    operands = {dtype: torch.randn(2, side, side).to(dtype).unbind() for dtype in dtypes}
    calls = {dtype_name(dtype): lambda pair=pair: torch.matmul(*pair) for dtype, pair in operands.items()}
    with torch.inference_mode():
        times = timing.interleave(calls, seconds * len(calls), min_rounds=3, warmup=1)
    rows = []
    for name, samples in times.items():
        median, p20, p80 = samples.per_second(2 * side**3 / 1e12)
        rows.append({
            "kind": "ceiling", "source": "torch.matmul", "operation": name, "isa": None, "device": "cpu",
            "threads": torch.get_num_threads(), "side": side, "tflop_per_s": median, "tflop_per_s_p20": p20,
            "tflop_per_s_p80": p80, "spread": samples.spread, "rounds": samples.rounds, "note": CEILING_NOTE,
            "reason": None,
        })  # fmt: skip
    return rows
