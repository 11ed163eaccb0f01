"""README.md's tables and the pictures under bench/results are what the result files say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support_bench import module
from support_paths import ROOT

RESULTS = ROOT / "bench" / "results"


def row(peer: str, rate: float | None, **more: object) -> dict:
    common = {"kind": "model", "arch": "s12", "size": 224, "dtype": "float32", "batch": 1, "isa_limit": None}
    figures = {"images_per_s": rate, "ratio": None, "verdict": None, "reason": None, "spread": 0.1}
    return {**common, **figures, "memory_ratio": None, "error_ratio_rms": None, "peer": peer, **more}


def rows() -> list[dict]:
    """Two cells, the larger batch first: OpenVINO's throughput mode is the faster one at batch 1 and fails at 16."""
    return [
        row("ours", 400.0, batch=16, error_ratio_rms=0.5),
        row("eager", 100.0, batch=16, ratio=4.04, verdict="too noisy to judge", spread=0.6, memory_ratio=0.2),
        row("openvino_latency", 300.0, batch=16, ratio=1.3, verdict="faster"),
        row("openvino_throughput", None, batch=16, reason="it failed"),
        row("ours", 90.0, error_ratio_rms=0.75),
        row("eager", 60.0, ratio=1.5, verdict="faster", memory_ratio=0.1),
        row("openvino_latency", 80.0, ratio=1.1, verdict="faster"),
        row("openvino_throughput", 100.0, ratio=0.9, verdict="slower"),
        row("onnxruntime", None, reason="ImportError: onnxruntime is not installed"),
        {"kind": "op", "op": "norm"},
    ]


HEAD = {
    "kind": "header", "cpu": "A & B", "torch_threads": 2, "torch": "2.13.0+cpu", "date": "2026-01-01T00:00:00",
    "isa": "avx2", "isa_supported": ["avx2", "scalar"],
}  # fmt: skip


def test_table_has_the_faster_mode_and_no_empty_column() -> None:
    found = module("readme_tables").table(module("result_file").cells(rows()))
    assert found.splitlines() == [
        "| | images/s | over eager | over OpenVINO | extra memory | error |",
        "|---|---|---|---|---|---|",
        "| S12 at 224 px, float32, batch 1 | 90 | 1.50x | **0.90x** | 0.10x | 0.75x |",
        "| S12 at 224 px, float32, batch 16 | 400 | 4.04x (noisy) | 1.30x | 0.20x | 0.50x |",
    ]


def test_readme_is_what_the_result_files_say() -> None:
    text = (ROOT / "README.md").read_text()
    readme_tables = module("readme_tables")
    assert readme_tables.filled(text) == text, "run python bench/readme_tables.py"


def test_summary_has_a_bar_for_each_peer_of_each_panel() -> None:
    drawn = module("summary").picture(HEAD, rows())
    svg = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(drawn)
    texts = [found.text for found in root.iter(f"{svg}text")]
    assert "A & B, 2 threads, torch 2.13.0, 2026-01-01" in texts
    assert texts.count("riformer_kernels") == texts.count("OpenVINO") == 1 and "ONNX Runtime" not in texts
    for expected in ("float32, batch 1", "90", "100", "60", "float32, batch 16", "400", "300", "100 (noisy)"):
        assert expected in texts, expected
    bars = [found for found in root.iter(f"{svg}rect") if found.get("fill") != "white"]
    widths = [float(found.get("width")) for found in bars]
    assert [width / max(widths) for width in widths] == pytest.approx([0.9, 1.0, 0.6, 1.0, 0.75, 0.25], abs=1e-3)
    assert [found.get("fill") for found in bars].count("#0072b2") == 2
    assert module("summary").picture(HEAD, [{"kind": "op"}]) is None


def test_summary_says_what_everybody_was_limited_to_and_leaves_int8_out() -> None:
    limited = [{**found, "isa_limit": "avx2"} for found in rows()[:-1]]
    quantised = [
        row("ours", None, dtype="int8", reason="not offered by this version: x"),
        row("eager", 9.0, dtype="int8"),
    ]
    drawn = module("summary").picture(HEAD, [*limited, *quantised])
    assert "images per second, everybody limited to AVX2" in drawn and "int8" not in drawn
    assert "limited" not in module("summary").picture(HEAD, rows())


def test_summary_says_why_a_peer_has_no_bar() -> None:
    reason = "the CPU provider has float32 convolutions only"
    both = [row("ours", 9.0), row("onnxruntime", 8.0), row("ours", 9.0, dtype="bfloat16")]
    drawn = module("summary").picture(HEAD, [*both, row("onnxruntime", None, dtype="bfloat16", reason=reason)])
    assert ">no bfloat16<" in drawn


@pytest.mark.parametrize("picture", sorted(RESULTS.glob("*-summary.svg")), ids=lambda path: path.stem)
def test_committed_summary_is_of_its_result_file(picture: Path, tmp_path: Path) -> None:
    found = module("summary").draw(RESULTS / re.sub(r"-summary\.svg$", ".jsonl", picture.name), tmp_path)
    assert found.read_text() == picture.read_text(), f"run python bench/summary.py for {picture.name}"
    assert len(found.read_bytes()) < 60_000
