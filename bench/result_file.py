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


def read(path: Path) -> tuple[Row, list[Row]]:
    """Header and rows."""
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    return head, rows


def machine_name(head: Row) -> str:
    """What the rows were measured on, in one line."""
    torch = head["torch"].partition("+")[0]
    return f"{head['cpu']}, {head['torch_threads']} threads, torch {torch}, {head['date'][:10]}"


def is_noisy(row: Row) -> bool:
    """Whether it scattered too much, or others used too much of the machine: where a verdict would be withheld."""
    return (row.get("spread") or 0.0) > MOST_SPREAD or (row.get("elsewhere") or 0.0) > MOST_ELSEWHERE


def why_not(row: Row) -> str:
    """Why there is no time in this row, in two words."""
    if "not installed" in (row["reason"] or ""):
        return "not installed"
    return f"no {row['dtype']}" if row["dtype"] != "float32" else "failed"


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


def cells(rows: Sequence[Row]) -> list[Cell]:
    """The cells: models in the order of the file, float32 before bfloat16 before float16, small batches first."""
    found: dict[tuple[Any, ...], Cell] = {}
    for row in rows:
        if row["kind"] == "model":
            key = row["arch"], row["size"], row.get("isa_limit"), row["dtype"], row["batch"]
            found.setdefault(key, Cell(*key, rows={})).rows[row["peer"]] = row
    models = list(dict.fromkeys(cell.model for cell in found.values()))
    dtypes = ("float32", "bfloat16", "float16")
    return sorted(found.values(), key=lambda cell: (models.index(cell.model), dtypes.index(cell.dtype), cell.batch))
