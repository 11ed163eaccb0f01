"""S12 at 224 px, images to logits, against every peer. torch.compile takes minutes; ``--no-compile`` skips it."""

from __future__ import annotations

from typing import Any

import measure
import peers
import pytest
import torch
from subject import Subject, random_images, random_model


@pytest.mark.parametrize("batch", [1, 16])
def test_model(request: pytest.FixtureRequest, benchmark: Any, model_dtype: torch.dtype, batch: int) -> None:
    option = request.config.getoption
    compiled, seconds = not option("--no-compile"), option("--model-seconds")
    rows = measure.model("s12", 224, batch, model_dtype, seconds=seconds, names=peers.names(compiled))
    others = {row["peer"]: row for row in rows[1:]}
    best = measure.best_peer(rows, peers.UNCHANGED)
    assert best is not None
    benchmark.group = f"s12 at 224 px {measure.dtype_name(model_dtype)} batch {batch}"
    benchmark.extra_info.update(measure.extra_info(rows[0], others, best["peer"]))
    benchmark.extra_info["memory_ratio"] = {
        name: row["memory_ratio"] for name, row in others.items() if row["memory_ratio"]
    }
    subject = Subject(random_model("s12", model_dtype), random_images(batch, 224, model_dtype))
    call = peers.build(peers.OURS, subject).on(subject.x)
    with torch.inference_mode():
        benchmark.pedantic(call, rounds=10, iterations=1, warmup_rounds=2)
