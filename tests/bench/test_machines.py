"""Result files of several machines: which machine a file is of, its tables in README.md, and all in one picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support_bench import module
from support_paths import ROOT

RESULTS = ROOT / "bench" / "results"
SERVER = ["amx", "avx512_bf16", "avx512", "avx2", "amx-emulated", "scalar"]


def head(cpu: str = "A CPU", isa: str = "avx512_bf16", supported: list[str] | None = None, **more: object) -> dict:
    common = {"kind": "header", "torch_threads": 2, "torch": "2.13.0+cpu", "date": "2026-01-01T00:00:00"}
    supported = supported or SERVER[SERVER.index(isa) :]
    return {**common, "cpu": cpu, "isa": isa, "isa_supported": supported, "settings": {"quick": False}, **more}


def row(peer: str, rate: float | None, ratio: float | None = None, **more: object) -> dict:
    found = {"kind": "model", "arch": "s12", "size": 224, "dtype": "float32", "batch": 1, "isa_limit": None}
    found |= {"peer": peer, "images_per_s": rate, "ratio": ratio, "verdict": "even", "reason": None, "spread": 0.1}
    found |= {"ratio_p20": ratio and ratio - 0.1, "ratio_p80": ratio and ratio + 0.1}
    return {**found, "memory_ratio": None, "error_ratio_rms": 0.5 if peer == "ours" else None, **more}


def write(folder: Path, name: str, header: dict, *rows: dict) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(found) + "\n" for found in (header, *rows)))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two machines, one of them with two files, and files that are of no machine."""
    made = tmp_path / "results"
    made.mkdir()
    eager, vino = row("eager", 60.0, 1.5), row("openvino_latency", 100.0, 0.9)
    write(made, "b-old.jsonl", head(date="2025-12-31T00:00:00"), row("ours", 11.0), row("ours", 12.0, batch=16))
    limited = [row("ours", 40.0, isa_limit="avx2"), row("eager", 30.0, 1.3, isa_limit="avx2")]
    write(made, "a-new.jsonl", head(), row("ours", 90.0), eager, vino, *limited)
    write(made, "c.jsonl", head("B CPU", "avx2"), row("ours", 33.0), row("compile", 30.0, 1.1))
    forced = head(isa="avx2", supported=SERVER[1:], environment={"RIFORMER_CPU_ISA": "avx2"})
    write(made, "forced.jsonl", forced, row("ours", 777.0))
    write(made, "quick.jsonl", head(settings={"quick": True}), row("ours", 666.0))
    write(made, "growth.jsonl", head(), {"kind": "growth"})
    monkeypatch.setattr(module("readme_tables"), "RESULTS", made)
    return made


def test_files_are_of_the_machine_and_not_of_what_it_was_limited_to(folder: Path) -> None:
    result_file = module("result_file")
    first, second = result_file.machines(sorted(folder.glob("*.jsonl")))
    assert (first.name, second.name) == ("A CPU, AVX-512 with BF16", "B CPU, AVX2")
    assert [name for _, name in first.files] == ["b-old.jsonl", "a-new.jsonl"], "by date; growth has no row of a model"
    assert first.limits == [None, "avx2"] and second.limits == [None]
    rates = {(cell.limit, cell.batch): cell.ours["images_per_s"] for cell in first.cells}
    assert rates == {(None, 1): 90.0, (None, 16): 12.0, ("avx2", 1): 40.0}, "the newer figure of a cell"
    assert first.cells[0].best_peer["peer"] == "openvino_latency"
    forced = json.loads((folder / "forced.jsonl").read_text().splitlines()[0])
    assert result_file.forced_set(forced) == "avx2" and result_file.machine_set(forced) == "avx512_bf16"
    assert result_file.machine_name(forced).endswith("2026-01-01, this engine limited to AVX2")


def test_readme_has_tables_for_every_machine_and_limit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme_tables = module("readme_tables")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- machines -->\nan old table\n<!-- end of machines -->\nafter\n")
    monkeypatch.setattr(readme_tables, "README", readme)
    assert readme_tables.main(["--check"]) == 1 and "an old table" in readme.read_text()
    assert readme_tables.main([]) == 0 and readme_tables.main(["--check"]) == 0
    text = readme.read_text()
    start = (
        "before\n<!-- machines -->\n\n**A CPU, AVX-512 with BF16**: 2 threads, torch 2.13.0, 2025-12-31, 2026-01-01; "
    )
    assert text.startswith(start)
    assert text.endswith("|\n\n<!-- end of machines -->\nafter\n") and "an old table" not in text
    parts = text.split("\n\n")
    titles = [part.split("**")[1] for part in parts if part.startswith("**")]
    assert titles == ["A CPU, AVX-512 with BF16", "Limited to AVX2", "B CPU, AVX2"]
    assert "**Limited to AVX2** on A CPU, AVX-512 with BF16." in text
    assert "777" not in text and "666" not in text, "neither forced nor quick files are of a machine"
    assert "[`b-old.jsonl`](bench/results/b-old.jsonl), [`a-new.jsonl`](bench/results/a-new.jsonl)" in text


def test_readme_without_a_place_for_the_tables_says_what_it_expects() -> None:
    with pytest.raises(ValueError, match="expected <!-- machines -->"):
        module("readme_tables").filled("nothing\n")


def test_int8_table_has_reasons_errors_and_agreement() -> None:
    result_file, readme_tables = module("result_file"), module("readme_tables")
    refused = row("ours", None, dtype="int8", reason="not offered by this version: no backend", error_ratio_rms=None)
    missing = {"dtype": "int8", "reason": "ImportError: nncf is not installed (pip install x)"}
    rows = [
        refused, {**refused, "batch": 16},
        row("onnxruntime", 50.0, dtype="int8", error_ratio_rms=7.0),
        row("onnxruntime", 100.0, dtype="int8", batch=16, error_ratio_rms=8.0),
        row("openvino_latency", None, **missing), row("openvino_latency", None, batch=16, **missing),
    ]  # fmt: skip
    judged = {"kind": "int8_accuracy", "arch": "s12", "size": 224}
    accuracy = [
        {**judged, "peer": "eager_bfloat16", "error_ratio_rms": 1.0, "digits_agreement": 0.999},
        {**judged, "peer": "onnxruntime", "error_ratio_rms": 5.5, "digits_agreement": 0.998},
    ]
    assert readme_tables.int8_table(result_file.cells(rows), accuracy).splitlines() == [
        "| | images/s, batch 1 | images/s, batch 16 | error of logits | of features | digits answered as by float64 |",
        "|---|---|---|---|---|---|",
        "| eager, bfloat16 | - | - | 1.00x | 1.00x | 99.9% |",
        "| **this engine, int8** | not offered by this version | not offered by this version | - | - | - |",
        "| OpenVINO, latency | not installed | not installed | - | - | - |",
        "| ONNX Runtime, static | 50 | 100 | 8.00x | 5.50x | 99.8% |",
    ]
    offered = [row("ours", 80.0, dtype="int8"), row("onnxruntime", 50.0, 1.6, dtype="int8")]
    lines = readme_tables.int8_table(result_file.cells(offered), []).splitlines()
    assert lines[0].startswith("| | images/s, batch 1 | ours over it, batch 1 |") and "| 50 | 1.60x |" in lines[-1]


# ---------------------------------------------------------------------------------------------------------- picture


def test_picture_has_a_dot_for_each_machine_limit_and_batch(folder: Path) -> None:
    machines, result_file = module("machines"), module("result_file")
    drawn = machines.picture(result_file.machines(sorted(folder.glob("*.jsonl"))))
    svg = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(drawn)
    texts = [found.text for found in root.iter(f"{svg}text")]
    assert "2 machines" in texts and texts.count("float32") == 1
    names = ["A CPU, AVX-512 with BF16, batch 1", "limited to AVX2 on A CPU, batch 1", "B CPU, AVX2, batch 1"]
    assert [text for text in texts if text.endswith("batch 1")] == names, "batch 16 has no peer"
    ratios = [text for text in texts if "x " in text and text[0].isdigit()]
    assert ratios == ["0.90x OpenVINO", "1.30x eager", "1.10x torch.compile"]
    dots = [float(found.get("cx")) for found in root.iter(f"{svg}circle")]
    lines = [found for found in root.iter(f"{svg}line") if found.get("stroke-width") == "2"]
    middles = [(float(found.get("x1")) + float(found.get("x2"))) / 2 for found in lines]
    assert dots == pytest.approx(middles, abs=0.1) and dots[0] < dots[2] < dots[1]


def test_picture_of_one_machine_says_so_and_none_without_rows(tmp_path: Path) -> None:
    machines = module("machines")
    assert machines.draw(tmp_path) is None and machines.main([str(tmp_path)]) == 1
    noisy = row("eager", 60.0, 9.0, spread=0.9)
    write(tmp_path, "a.jsonl", head(), row("ours", 90.0), noisy)
    assert machines.main([str(tmp_path)]) == 0
    text = (tmp_path / "machines.svg").read_text()
    assert "1 machine so far" in text and 'fill="white" stroke' in text, "hollow: too noisy"


def test_committed_picture_is_of_the_result_files(tmp_path: Path) -> None:
    found = module("machines").draw(RESULTS, tmp_path)
    assert found.read_text() == (RESULTS / "machines.svg").read_text(), "run python bench/machines.py"


def test_committed_files_name_the_instruction_sets_as_the_library_does() -> None:
    known = set(module("isa").TABLE)
    for path in RESULTS.glob("*.jsonl"):
        header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        best = module("result_file").machine_set(header)
        assert path.name.startswith(module("compare").default_path(header, False).stem), path.name
        assert {*header["isa_supported"], *(found.get("isa") or "avx2" for found in rows)} <= known
        assert ("avx512_bf16" in header["flags"]) == (best in ("amx", "avx512_bf16")), path.name


# ------------------------------------------------------------------------------------------------------- file names


@pytest.mark.parametrize(
    ("header", "quick", "limits", "name"),
    [
        (head("AMD EPYC"), False, (), "amd-epyc-avx512-bf16"),
        (head("AMD EPYC"), True, (), "amd-epyc-avx512-bf16-quick"),
        (head("AMD EPYC"), False, ("avx512", "avx2"), "amd-epyc-avx512-bf16-limited-to-avx512-avx2"),
        (head("AMD EPYC", "avx2", SERVER[1:]), False, (), "amd-epyc-avx512-bf16-ours-limited-to-avx2"),
        (head("Intel(R) X", "amx"), False, (), "intel-r-x-amx"),
    ],
    ids=["full", "quick", "limited", "forced", "amx"],
)
def test_a_limited_result_has_no_name_of_a_machine(header: dict, quick: bool, limits: tuple, name: str) -> None:
    assert module("compare").default_path(header, quick, limits).stem == name
