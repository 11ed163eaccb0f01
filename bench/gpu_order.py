"""A pytest plugin for machines that are lent for minutes: what only hardware can settle runs first, and each result is
written as soon as it is there.

    python -m pytest -p gpu_order -m gpu ...        # with bench/ on the path; RIFORMER_RESULTS=FILE for the results

A failure is printed at once. So whatever ends the run, what is known by then is in the log and in the file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

# Everything else about numbers has been seen in emulation. These have not: the same bits whatever runs beside it,
# graphs, streams, threads, what the driver and the allocator do.
FIRST = (
    "test_same_bits_again", "test_a_graph_replays", "test_engine[", "test_two_streams", "test_features",
    "test_engine_of_many", "test_no_synchronisation", "test_fresh_weights", "test_bad_input", "test_compile_and",
    "test_conformance", "test_promises",
)  # fmt: skip
# These take most of the GPU's memory, or leave PyTorch's allocator with little.
LAST = ("test_offsets_beyond", "test_out_of_memory")


def rank(name: str, slow: bool) -> tuple[int, int]:
    """Where a test comes: sorted by this, and otherwise in the order of the files."""
    if any(part in name for part in LAST):
        return 3, 0
    if slow:  # whole models; the dtype and the smallest network that is measured first
        return 2, 0 if "bfloat16" in name and "s12" in name else 1
    return 0 if any(part in name for part in FIRST[:4]) else 1, next(
        (place for place, part in enumerate(FIRST) if part in name), len(FIRST)
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: rank(item.nodeid, item.get_closest_marker("slow") is not None))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    if report.failed:
        sys.__stderr__.write(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext[-2000:]}\n")
        sys.__stderr__.flush()
    if path := os.environ.get("RIFORMER_RESULTS"):
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")
