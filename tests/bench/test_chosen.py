"""The bench that fails when the chosen instruction set is slower than another: its judgement, on made-up timings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from support_bench import module

from riformer_kernels.backends import cpu
from riformer_kernels.timing import Ratio, Samples

CALM = (1.0, 1.01, 0.99, 1.0, 1.02)


def times(**seconds: float) -> dict[str, Samples]:
    """Steady samples of so many seconds for each set; each scatters in its own order."""
    found = {}
    for turn, (name, value) in enumerate(seconds.items()):
        found[name] = Samples(tuple(value * CALM[(at + turn) % len(CALM)] for at in range(len(CALM))))
    return found


def ratios(**seconds: float) -> dict[str, Ratio]:
    return module("chosen").ratios(times(**seconds), "avx512")


def test_a_faster_set_is_found_and_named() -> None:
    chosen = module("chosen")
    (found,) = chosen.findings(ratios(avx512=1.2, avx512_bf16=1.2, avx2=1.0), "avx512")
    assert found.startswith("avx512 is chosen, but only 0.83x as fast as avx2 (0.8")


def test_the_fastest_set_and_equal_ones_are_fine() -> None:
    chosen = module("chosen")
    assert chosen.findings(ratios(avx512=1.0, avx2=1.9), "avx512") == []
    assert chosen.findings(ratios(avx512=1.0, avx2=1.0), "avx512") == []
    assert chosen.findings(ratios(avx512=1.03, avx2=1.0), "avx512") == [], "within what equal sets are apart"
    # Slower by far in the median, but not in 80 % of the rounds.
    mixed = {"avx2": Ratio(median=0.8, p20=0.7, p80=1.1)}
    assert chosen.findings(mixed, "avx512") == []


def several(*measured: dict[str, Ratio]) -> tuple[Callable[[], dict[str, Ratio]], Iterator[dict[str, Ratio]]]:
    left = iter(measured)
    return lambda: next(left), left


def test_a_finding_needs_a_second_measurement() -> None:
    chosen = module("chosen")
    slow, fast = ratios(avx512=1.2, avx2=1.0), ratios(avx512=1.0, avx2=1.2)
    noisy = {"avx2": Ratio(median=0.8, p20=0.6, p80=0.9)}
    for measured, expected, unused in (
        ((slow, slow, fast), 1, 1),
        ((slow, fast, slow), 0, 1),
        ((fast, slow), 0, 1),
        ((noisy, slow, slow), 1, 0),
        ((slow, noisy, slow), 1, 0),
    ):
        measure, left = several(*measured)
        assert len(chosen.judged(measure, "avx512")) == expected
        assert len(list(left)) == unused
    for measured in ((noisy, noisy, noisy), (noisy, slow, noisy)):
        assert chosen.judged(several(*measured)[0], "avx512") is None, "too noisy for a finding, and for none"


def test_a_slow_minute_slows_all_sets_and_is_no_noise() -> None:
    chosen = module("chosen")
    drifting = (1.0, 1.5, 2.0, 2.5, 3.0)
    both = {"avx512": Samples(drifting), "avx2": Samples(tuple(2 * value for value in drifting))}
    assert both["avx512"].spread > module("verdict").MOST_SPREAD
    assert not chosen.noisy(chosen.ratios(both, "avx512"))


def test_sets_take_turns_and_the_one_from_before_holds_afterwards(native: None) -> None:
    chosen = module("chosen")
    before = cpu.isa_status()["chosen"]
    first, names = chosen.automatic()
    supported = [name for name in cpu.isa_status()["supported"] if name in module("isa").HARDWARE]
    assert names == supported and first == (supported or ["scalar"])[0]
    calls: list[str] = []
    every = [*names, "scalar"]
    with pytest.raises(ZeroDivisionError):
        chosen.samples(lambda: calls.append(cpu.isa_status()["chosen"]) or 1 / 0, every, 0.0)
    assert cpu.isa_status()["chosen"] == before and calls == every[:1]
    found = chosen.samples(lambda: calls.append(cpu.isa_status()["chosen"]), every, 0.0)
    assert list(found) == every and set(calls) == set(every) and cpu.isa_status()["chosen"] == before


def test_a_set_that_the_machine_lacks_is_refused_by_name_with_what_there_is(native: None) -> None:
    status = cpu.isa_status()
    lacking = next((name for name in status["compiled"] if name not in status["supported"]), "sse")
    code = (
        "import riformer, riformer_kernels\n"
        "riformer_kernels.patch(riformer.RIFormer({'layers': [1] * 4, 'embed_dims': [16] * 4}, deploy=True))"
    )
    environment = {**os.environ, "RIFORMER_CPU_ISA": lacking, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert f"BackendError: no backend serves torch.float32 on cpu (cpu: RIFORMER_CPU_ISA={lacking}: " in last
    assert f"expected one of {', '.join(status['supported'])}" in last and f"'{lacking}'" in last
    if lacking != "sse":
        assert "this machine lacks" in last
