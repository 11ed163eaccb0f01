"""Kernels know nothing of PyTorch: only the bindings include its headers, directly or through other files.

So that a kernel takes raw pointers and strides, compiles without PyTorch, and runs on the emulator unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from support_paths import ROOT

CSRC = ROOT / "csrc"
SOURCES = {path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")}
TORCH = re.compile(r'^\s*#\s*include\s*[<"](?:torch|ATen|c10|caffe2)/', re.MULTILINE)
QUOTED = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
# Where bindings begin. What only bindings include belongs to them.
BINDINGS = {path for path in SOURCES if path.name.endswith("bindings.cpp")} | {CSRC / "common" / "arguments.h"}

Texts = Mapping[Path, str]


def included(texts: Texts) -> dict[Path, set[Path]]:
    """What each file includes by quotes, of the files in ``texts``."""
    found = {}
    for path, text in texts.items():
        beside = ((path.parent / name).resolve() for name in QUOTED.findall(text))
        found[path] = {other for other in beside if other in texts}
    return found


def closure(start: set[Path], edges: Mapping[Path, set[Path]]) -> set[Path]:
    """Everything that can be reached from ``start``, itself included."""
    reached, waiting = set(start), list(start)
    while waiting:
        new = edges[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def bindings_of(texts: Texts, roots: set[Path]) -> set[Path]:
    """The bindings: ``roots``, and what nothing else includes."""
    edges = included(texts)
    found = set(roots)
    while True:
        candidates = closure(found, edges) - found
        more = {path for path in candidates if all(other in found for other in texts if path in edges[other])}
        if not more:
            return found
        found |= more


def offenders(texts: Texts, roots: set[Path]) -> dict[str, list[str]]:
    """Files that are no bindings, and the files with torch headers that they include."""
    edges = included(texts)
    with_torch = {path for path, text in texts.items() if TORCH.search(text)}
    kernels = texts.keys() - bindings_of(texts, roots)
    found = {name_of(path): sorted(map(name_of, closure({path}, edges) & with_torch)) for path in kernels}
    return {name: torch for name, torch in found.items() if torch}


def name_of(path: Path) -> str:
    return str(path.relative_to(CSRC))


def texts_of(sources: set[Path]) -> dict[Path, str]:
    return {path: path.read_text() for path in sources}


def test_only_bindings_include_torch():
    assert not offenders(texts_of(SOURCES), BINDINGS)


def test_every_binding_includes_torch():
    """Otherwise the files were not found, or the pattern finds nothing."""
    texts = texts_of(SOURCES)
    edges = included(texts)
    with_torch = {path for path, text in texts.items() if TORCH.search(text)}
    assert all(closure({path}, edges) & with_torch for path in BINDINGS) and len(BINDINGS) >= 3


@pytest.mark.parametrize(
    "line", ["#include <torch/all.h>", '  # include "torch/csrc/stable/tensor.h"', "#include <c10/x.h>"]
)
@pytest.mark.parametrize("through", [False, True], ids=["directly", "through a header"])
def test_a_kernel_that_includes_torch_is_noticed(line, through):
    texts = texts_of(SOURCES)
    kernel = CSRC / "cpu" / "block.h"
    if through:
        header = CSRC / "common" / "new.h"
        texts[header] = f"{line}\n"
        texts[kernel] += '\n#include "../common/new.h"\n'
    else:
        texts[kernel] += f"\n{line}\n"
    assert "cpu/block.h" in offenders(texts, BINDINGS)


def test_a_kernel_that_includes_what_bindings_share_is_noticed():
    texts = texts_of(SOURCES)
    texts[CSRC / "cuda" / "norm.h"] += '\n#include "host.h"\n'
    assert "cuda/norm.h" in offenders(texts, BINDINGS)
