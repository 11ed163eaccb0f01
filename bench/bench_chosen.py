"""The chosen instruction set against all others of the machine, on the whole model: ``pytest bench -k chosen``."""

from __future__ import annotations

import chosen
import isa
import peers_torch
import pytest
import torch
from measure import dtype_name, float_subject

from riformer_kernels.timing import Ratio


@pytest.mark.parametrize("batch", [1, 16])
def test_chosen_instruction_set_is_the_fastest(
    request: pytest.FixtureRequest, model_dtype: torch.dtype, batch: int
) -> None:
    isa.check()
    first, names = chosen.automatic()
    if len(names) < 2:
        pytest.skip(f"nothing to choose from: this machine has {', '.join(names) or 'plain C++'} only")
    subject = float_subject("s12", 224, batch, model_dtype)
    call = peers_torch.ours(subject).on(subject.x)
    seconds = request.config.getoption("--model-seconds")

    def measure() -> dict[str, Ratio]:
        with torch.inference_mode():
            times = chosen.samples(call, names, seconds)
        found = chosen.ratios(times, first)
        print(f"{dtype_name(model_dtype)}, batch {batch}: {first} {batch / times[first].median:.1f} images/s, ", end="")
        print(
            ", ".join(f"{speed.median:.3f}x {name} ({speed.p20:.3f}..{speed.p80:.3f})" for name, speed in found.items())
        )
        return found

    found = chosen.judged(measure, first)
    if found is None:
        pytest.skip("too noisy to judge, three times: other processes use this machine")
    assert not found, "; ".join(found)
