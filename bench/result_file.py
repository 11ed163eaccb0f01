"""Reading a result file: its header, its rows, and the cells of the comparison with the peers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verdict import MOST_ELSEWHERE, MOST_SPREAD

Row = dict[str, Any]

OURS = "ours"
GROUPS: dict[str, tuple[str, ...]] = {
    "eager": ("eager",),
    "eager channels_last": ("eager_channels_last",),
    "eager, rewritten by hand": ("eager_linear",),
    "torch.compile": ("compile",),
    "torch.compile, rewritten by hand": ("compile_linear",),
    "ONNX Runtime": ("onnxruntime",),
    "OpenVINO": ("openvino_latency", "openvino_throughput"),
}
"""Peers by the name that readers know; of several modes the faster one counts."""


SETS = {
    "amx": "AMX",
    "avx512_bf16": "AVX-512 with BF16",
    "avx512_vnni": "AVX-512 with VNNI, without BF16",
    "avx512": "AVX-512 without BF16",
    "avx2_vnni": "AVX2 with VNNI",
    "avx2": "AVX2",
    "neon_bf16": "NEON with BF16",
    "neon": "NEON",
}
"""The processors' instruction sets, the best first, as readers know them."""

FLOATS = ("float32", "bfloat16", "float16")
INT8 = "int8"


def read(path: Path) -> tuple[Row, list[Row]]:
    """Header and rows."""
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    return head, rows


def machine_set(head: Row) -> str:
    """The best instruction set of the machine, whichever was used."""
    return next((name for name in head.get("isa_supported", ()) if name in SETS), head["isa"])


def forced_set(head: Row) -> str | None:
    """The instruction set that this engine was held to by ``RIFORMER_CPU_ISA``, unless that is the machine's best."""
    return head["isa"] if head["isa"] != machine_set(head) else None


def machine_name(head: Row) -> str:
    """What the rows were measured on, in one line."""
    torch = head["torch"].partition("+")[0]
    forced = f", this engine limited to {SETS.get(head['isa'], head['isa'])}" if forced_set(head) else ""
    return f"{head['cpu']}, {head['torch_threads']} threads, torch {torch}, {head['date'][:10]}{forced}"


def is_noisy(row: Row) -> bool:
    """Whether it scattered too much, or others used too much of the machine: where a verdict would be withheld."""
    return (row.get("spread") or 0.0) > MOST_SPREAD or (row.get("elsewhere") or 0.0) > MOST_ELSEWHERE


def why_not(row: Row) -> str:
    """Why there is no time in this row, in a few words."""
    if "not installed" in (row["reason"] or ""):
        return "not installed"
    if (row["reason"] or "").startswith("not offered"):
        return "not offered by this version"
    return f"no {row['dtype']}" if row.get("dtype") in ("bfloat16", "float16") else "failed"


@dataclass(frozen=True)
class Cell:
    """The rows of all peers for one model, size, dtype, batch and limit on the instruction set."""

    arch: str
    size: int
    limit: str | None
    dtype: str
    batch: int
    rows: dict[str, Row]

    @property
    def model(self) -> tuple[str, int, str | None]:
        return self.arch, self.size, self.limit

    @property
    def ours(self) -> Row:
        return self.rows[OURS]

    def fastest(self, names: Iterable[str]) -> Row | None:
        """The row of the fastest of these peers; None where none of them was measured."""
        measured = [self.rows[name] for name in names if self.rows.get(name, {}).get("images_per_s") is not None]
        return max(measured, key=lambda row: row["images_per_s"], default=None)

    @property
    def best_peer(self) -> Row | None:
        """The row of the fastest peer of any form, or None."""
        return self.fastest(name for name in self.rows if not name.startswith(OURS))


@dataclass(frozen=True)
class Machine:
    """What all result files of one machine say together. A later file's cell takes the place of an earlier one's.

    Attributes:
        name: the processor and its best instruction set.
        files: headers and file names, in the order of their dates.
    """

    cpu: str
    best: str
    threads: int
    files: list[tuple[Row, str]]
    cells: list[Cell]
    accuracy: list[Row]

    @property
    def name(self) -> str:
        return f"{self.cpu}, {SETS.get(self.best, self.best)}"

    @property
    def limits(self) -> list[str | None]:
        """None for what was measured without a limit, then the limits."""
        return sorted({cell.limit for cell in self.cells}, key=lambda limit: (limit is not None, limit))


def machines(paths: Iterable[Path]) -> list[Machine]:
    """All machines that the result files are of, by name; machines with another number of threads are others.

    Files of ``RIFORMER_CPU_ISA`` and quick ones are of no machine: there only this engine was limited, and nothing was
    measured for long.
    """
    found: dict[tuple[str, str, int], list[tuple[Row, list[Row], str]]] = {}
    for path in paths:
        head, rows = read(path)
        if head.get("kind") != "header" or forced_set(head) or head.get("settings", {}).get("quick"):
            continue
        key = head["cpu"], machine_set(head), head["torch_threads"]
        found.setdefault(key, []).append((head, rows, path.name))
    made = []
    for key in sorted(found):
        files = sorted(found[key], key=lambda file: (file[0]["date"], file[2]))
        latest: dict[tuple[Any, ...], Cell] = {}
        for _, rows, _ in files:
            for cell in cells(rows):
                latest[(*cell.model, cell.dtype, cell.batch)] = cell
        accuracy = [[row for row in rows if row["kind"] == "int8_accuracy"] for _, rows, _ in files]
        names = [(head, name) for head, rows, name in files if any(row["kind"] == "model" for row in rows)]
        if latest:
            made.append(Machine(*key, names, _ordered(latest.values()), next(filter(None, reversed(accuracy)), [])))
    return made


def cells(rows: Sequence[Row]) -> list[Cell]:
    """The cells: models in the order of the file, float32 first and int8 last, small batches first."""
    found: dict[tuple[Any, ...], Cell] = {}
    for row in rows:
        if row["kind"] == "model":
            key = row["arch"], row["size"], row.get("isa_limit"), row["dtype"], row["batch"]
            found.setdefault(key, Cell(*key, rows={})).rows[row["peer"]] = row
    return _ordered(found.values())


def _ordered(found: Iterable[Cell]) -> list[Cell]:
    found = list(found)
    models = list(dict.fromkeys(cell.model for cell in found))
    dtypes = (*FLOATS, INT8)
    return sorted(found, key=lambda cell: (models.index(cell.model), dtypes.index(cell.dtype), cell.batch))
