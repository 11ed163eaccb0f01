"""``riformer-kernels info``: what is installed, what this machine can do, what is switched on."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from typing import Any

from ._arguments import EXIT_CODES, add_format
from ._output import document, table

SUMMARY = "versions, CPU features, backends and why one is not usable, environment variables"
DESCRIPTION = """\
Show what is installed, what this machine's processor can do, which backends are built and usable
(and why not), and the environment variables that change anything. Worth pasting into a bug report."""
EPILOG = f"""\
examples:
  riformer-kernels info
  riformer-kernels info --format json
  RIFORMER_CPU_ISA=avx2 riformer-kernels info

{EXIT_CODES}"""

# What the kernels are compiled for, as /proc/cpuinfo spells it; for machines where the library cannot say.
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16")
_VARIABLES = (
    (
        "RIFORMER_CPU_ISA",
        "at run time, before the first use",
        "instruction set of the native CPU kernels; unset: the best that the machine has",
    ),
    ("RIFORMER_CPU", "when the package is built", "off: install without the native CPU kernels"),
    (
        "RIFORMER_CUDA",
        "when the package is built",
        "off, on or auto: the CUDA kernels; auto: where nvcc and a CUDA build of PyTorch are there",
    ),
    (
        "RIFORMER_CUDA_ARCHITECTURES",
        "when the package is built",
        "compute capabilities to compile the CUDA kernels for; unset: 80;90a",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_format(parser, "text", "json")


def run(arguments: argparse.Namespace) -> int:
    found = collect()
    if arguments.format == "json":
        document(found)
    else:
        _print(found)
    return 0


def collect() -> dict[str, Any]:
    """Everything that the command shows."""
    import torch

    from riformer_kernels import machine
    from riformer_kernels.backends import cpu

    status = cpu.isa_status()
    return {
        "versions": _versions(),
        "cpu": {
            "model": machine.cpu_name(),
            "architecture": platform.machine(),
            "logical_cpus": os.cpu_count(),
            "usable_cpus": machine.usable_cpus(),
            "torch_threads": torch.get_num_threads(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "features": status["features"] or _features(),
        },
        "backends": _backends(status),
        "environment": [
            {"name": name, "value": os.environ.get(name), "read": when, "meaning": meaning}
            for name, when, meaning in _VARIABLES
        ],
    }


def _versions() -> dict[str, str | None]:
    import torch

    import riformer_kernels

    found: dict[str, str | None] = {
        "riformer_kernels": riformer_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    # Looked up, not imported: mmpretrain's import takes seconds and may fail.
    return found | {
        name: _installed(name) for name in ("numpy", "safetensors", "pillow", "rich", "triton", "mmpretrain")
    }


def _installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _features() -> dict[str, bool]:
    from riformer_kernels import machine

    flags = machine.cpu_flags()
    return {name: name in flags for name in _FLAGS} if flags else {}


def _backends(status: dict[str, Any]) -> list[dict[str, Any]]:
    from riformer_kernels import backends

    # Of the others there is nothing to build before they are used.
    built = {"cpu": bool(status["compiled"]), "cuda": backends.cuda.not_built() is None}
    rows = []
    for backend in backends.ALL.values():
        reason = backend.unusable()
        row = {
            "name": backend.name,
            "built": built.get(backend.name, True),
            "usable": reason is None,
            "why_not": reason,
            "chosen_by_auto": backend.automatic,
            "devices": list(backend.devices) or ["any"],
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in backend.dtypes],
            "detail": backend.detail() if reason is None else None,
        }
        if backend.name == "cpu":
            row["instruction_sets"] = {key: status[key] for key in ("chosen", "supported", "compiled")}
        if backend.name == "cuda":
            row["architectures"] = backends.cuda.architectures()
        rows.append(row)
    return rows


def _print(found: dict[str, Any]) -> None:
    table(("package", "version"), [(name, version or "not installed") for name, version in found["versions"].items()])
    cpu = found["cpu"]
    has = [name for name, there in cpu["features"].items() if there]
    lacks = [name for name, there in cpu["features"].items() if not there]
    print()
    table(
        ("processor", ""),
        [
            ("model", cpu["model"]),
            (
                "CPUs",
                f"{cpu['usable_cpus']} usable of {cpu['logical_cpus']}; PyTorch uses {cpu['torch_threads']} threads",
            ),
            ("features that matter", ", ".join(has) or "none known"),
            ("not there", ", ".join(lacks) or "-"),
        ],
    )
    print()
    rows = []
    for backend in found["backends"]:
        words = [backend["why_not"] or backend["detail"]]
        if backend["why_not"] is None and not backend["chosen_by_auto"]:
            words.append("only when asked for by name")
        sets = backend.get("instruction_sets")
        if sets and sets["compiled"]:
            words.append(f"runs here: {', '.join(sets['supported'])}; built: {', '.join(sets['compiled'])}")
        if backend.get("architectures"):
            words.append(f"compiled for {', '.join(backend['architectures'])}")
        rows.append(
            (
                backend["name"],
                "yes" if backend["built"] else "no",
                "yes" if backend["usable"] else "no",
                ", ".join(backend["devices"]),
                ", ".join(backend["dtypes"]),
                "; ".join(words),
            )
        )
    table(("backend", "built", "usable", "device", "dtypes", "detail, or why not"), rows)
    print()
    variables = [
        (variable["name"], "(unset)" if variable["value"] is None else variable["value"], variable["read"],
         variable["meaning"])
        for variable in found["environment"]
    ]  # fmt: skip
    table(("variable", "value", "read", "meaning"), variables)
    sys.stdout.flush()
