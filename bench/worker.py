"""A worker: a process that holds one thing to be timed, times it when told to, and sleeps otherwise.

Every peer, ours included, runs in a worker of its own, and the driver lets the workers take turns (`timing.rotate`).
PyTorch, OpenVINO and ONNX Runtime each own a pool of threads that goes on spinning for a while after a call. In one
process, or one directly after the other, they take each other's cores (bench/notes/2026-11-21-comparing-peers.md).

Therefore the driver waits ``SETTLE`` seconds before each sample. By then the pool of the worker before has gone to
sleep. The worker then makes one call that is not timed, which wakes its own threads and fetches its weights. What is
timed is the steady state.

A process of its own also has an environment of its own. That is how a peer is limited to an instruction set (`isa.py`).
The driver and a worker exchange one line of JSON each way; tensors go through files.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from child import HERE, child_environment
from machine import Elsewhere

from riformer_kernels.timing import SHORTEST_SAMPLE, Samples, rotate

SETTLE = 0.05
SHORTEST = 20 * SHORTEST_SAMPLE
"""A sample of a worker is longer than one in this process, since the worker's threads have just been woken."""
BUILD_LIMIT, CALL_LIMIT = 1800.0, 300.0


class WorkerError(RuntimeError):
    """A worker failed or did not answer; ``name`` is which, and the text is its reason in one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class Worker:
    """A process that holds ``target(**arguments)``.

    Attributes:
        name: for messages.
        pid: of the process.
        facts: what ``target`` says about what it made: JSON values.
    """

    def __init__(
        self,
        name: str,
        target: str,
        arguments: Mapping[str, Any],
        *,
        threads: int | None = None,
        environment: Mapping[str, str] | None = None,
        limit: float = BUILD_LIMIT,
    ) -> None:
        """Start the process and make its subject.

        Args:
            target: "module:function", importable there; ``function(**arguments)`` returns the call to be timed and
                its facts, a dict. The fact "batches", where there is one, is how many batches one call takes.
            arguments: JSON values.
            threads: PyTorch's threads, set before; None leaves its choice.
            environment: variables on top of this process's.
            limit: seconds for that.

        Raises:
            WorkerError: the target raised, died or took too long; no process is left then.
        """
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (`close` closes it)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=child_environment(environment),
            start_new_session=True,  # so that a compiler that it started ends with it
        )
        self.pid = self._process.pid
        request = {"target": target, "arguments": dict(arguments), "threads": threads}
        try:
            self.facts: dict[str, Any] = self._ask(request, limit)["facts"]
        except BaseException:
            self.close()
            raise

    def sample(self, calls: int) -> float:
        """Seconds of a batch: the mean of ``calls`` calls in a row, after one that is not timed.

        Raises:
            WorkerError: the call raised, or the process died.
        """
        time.sleep(SETTLE)
        return self._ask({"calls": calls}, CALL_LIMIT * max(1, calls))["seconds"] / self.facts.get("batches", 1)

    def _ask(self, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(self.name, self._ended()) from None
        if not select.select([self._process.stdout], [], [], limit)[0]:
            raise WorkerError(self.name, f"no answer in {limit:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self.name, self._ended())
        answer = json.loads(line)
        if "reason" in answer:
            raise WorkerError(self.name, answer["reason"])
        return answer

    def _ended(self) -> str:
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        last = (self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        return f"the process ended ({how}): {last[:300]}"

    def close(self) -> None:
        """End the process and what it started. Safe to call twice."""
        if self._process.stdin.closed:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def take_turns(
    workers: Mapping[str, Worker], seconds: float, min_rounds: int = 5
) -> tuple[dict[str, Samples], float | None]:
    """`rotate` over workers: seconds per batch, and the share of the processors' time that others took.

    Raises:
        WorkerError: one of them failed.
    """
    samplers = {name: worker.sample for name, worker in workers.items()}
    with Elsewhere(worker.pid for worker in workers.values()) as elsewhere:
        times = rotate(samplers, seconds, min_rounds, warmup=1, shortest=SHORTEST)
    return times, elsewhere.share


# ----------------------------------------------------------------------------------------------- the worker's process


def _answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """An answer to each request. An exception is answered with its reason."""
    import torch

    call: Callable[[], object] | None = None
    with torch.inference_mode():
        for line in lines:
            request = json.loads(line)
            try:
                if call is None:
                    if request["threads"]:
                        torch.set_num_threads(request["threads"])
                    module, _, name = request["target"].partition(":")
                    call, facts = getattr(importlib.import_module(module), name)(**request["arguments"])
                    gc.collect()
                    gc.disable()
                    yield {"facts": facts}
                else:
                    yield {"seconds": _timed(call, request["calls"])}
            except Exception as error:
                yield {"reason": describe(error)}


def _timed(call: Callable[[], object], calls: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _main() -> None:
    # Answers go to what was standard output. What libraries print goes to standard error instead.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for answer in _answers(iter(sys.stdin.readline, "")):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    _main()
