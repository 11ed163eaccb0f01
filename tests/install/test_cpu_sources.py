"""What the CPU library's sources promise about lists that have to stay complete: dtypes, ops, instruction sets."""

from __future__ import annotations

import platform
import re
import subprocess

import torch
from support_compiler import compiled
from support_cpu import need_native
from support_paths import ROOT

from riformer_kernels import ops
from riformer_kernels.backends import cpu

DTYPES_HEADER = ROOT / "csrc" / "common" / "dtypes.h"
KERNELS = ROOT / "csrc" / "cpu"


def test_every_kernel_refuses_an_unknown_dtype(tmp_path):
    """Not only the bindings, which no such dtype passes: a kernel must never take one for another."""
    program = tmp_path / "unknown_dtype"
    sources = (
        ROOT / "tests" / "install" / "unknown_dtype.cpp",
        KERNELS / "kernels_scalar.cpp",
        KERNELS / "scratch.cpp",
    )
    built = compiled("-O0", "-o", program, *sources)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 28, f"{done.returncode}: {done.stdout}{done.stderr}"
    refused = re.compile(r"\w+ \w+: riformer: dtype 7 has no element type; add it to with_dtype .*")
    assert [line for line in lines if not refused.fullmatch(line)] == []


def test_a_dtype_without_an_element_type_does_not_compile(tmp_path):
    program = tmp_path / "size.cpp"
    program.write_text(
        '#include "dtypes.h"\nint main() { return int(riformer::size_of(riformer::DType::bf16)) - 2; }\n'
    )
    text = DTYPES_HEADER.read_text()
    more = re.sub(r"(enum class DType : int \{.*) \};", r"\1, i8 = 99 };", text)
    assert more != text
    options = ("-Wall", "-Werror=switch", "-I", tmp_path, "-o", tmp_path / "size", program)
    (tmp_path / "dtypes.h").write_text(text)
    built = compiled(*options)
    assert built.returncode == 0, built.stderr
    (tmp_path / "dtypes.h").write_text(more)
    built = compiled(*options)
    assert built.returncode != 0 and "i8" in built.stderr and "with_dtype" in built.stderr, built.stderr


def test_every_op_has_a_kernel():
    need_native()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [name for name in ops.ALL if not has_kernel(f"riformer::{name}", "CPU")]
    assert len(ops.ALL) >= 6 and missing == []


def test_every_instruction_set_of_the_list_is_compiled():
    """In the order of instruction_sets.def. The namespace of each stands in its source, where a search finds it."""
    need_native()
    machine = {"x86_64": "x86", "AMD64": "x86", "aarch64": "aarch64", "arm64": "aarch64"}.get(platform.machine())
    text = (KERNELS / "instruction_sets.def").read_text()
    sets = re.findall(r'^SET\((\w+), *(\w+), *"([^"]+)", *\w+, *([\w.]+),', text, re.MULTILINE)
    sets = [entry for entry in sets if entry[0] in ("any", machine)]
    assert cpu.isa_status()["compiled"] == [name for _, _, name, _ in sets]
    for _, space, _, source in sets:
        assert f"namespace riformer::{space} {{" in (KERNELS / source).read_text()
