"""`bench/engine_overhead.py` measures calls that replay, and what it says of them adds up."""

from __future__ import annotations

import pytest
import torch
from support_bench import module


def test_the_parts_of_a_call(bench_on_path: None) -> None:
    found = module("engine_overhead").measure("s12", torch.bfloat16, 0.2)
    whole, state = found["images on the GPU"], found["the comparison of the state"]
    assert 0 < state < whole and found["before the replay (images on the GPU)"] < whole
    # 21 measured on a machine that does nothing else (bench/notes); ten times that is no load, but a defect.
    assert whole < 210


def test_it_refuses_an_engine_that_captures_in_every_call(bench_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from riformer_kernels.graph_state import GraphState

    monkeypatch.setattr(GraphState, "holds", lambda self: False)
    with pytest.raises(AssertionError, match="captures anew in every call"):
        module("engine_overhead").measure("s12", torch.bfloat16, 0.2)
