"""What an installed package must hold: one version, types, no path of a machine, and kernels after the import alone."""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from support_paths import ROOT

import riformer_kernels
from riformer_kernels.backends import cpu


def _library() -> Path:
    if not cpu.LIBRARY.is_file():
        pytest.skip(f"the native library is not built: {cpu.unusable()}")
    return cpu.LIBRARY


def test_the_version_is_the_same_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE).group(1)
    assert newest == riformer_kernels.__version__
    try:
        installed = metadata.version("riformer-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("not installed: running from the source tree")
    assert installed == riformer_kernels.__version__


def test_every_package_is_installed():
    """The folders that pyproject.toml makes setuptools find are all those that Python would import."""
    setuptools = pytest.importorskip("setuptools")
    text = (ROOT / "pyproject.toml").read_text()
    where, include = re.search(r"where = (\[.*\])\ninclude = (\[.*\])", text).groups()
    found = set()
    for folder in json.loads(where):
        found |= set(setuptools.find_packages(str(ROOT / folder), include=json.loads(include)))
    folders = (ROOT / "riformer_kernels", ROOT / "python")
    files = [file for folder in folders for file in folder.rglob("__init__.py")]
    expected = {".".join(file.parent.relative_to(ROOT).parts).removeprefix("python.") for file in files}
    assert found == expected and {"riformer", "riformer_cli", "riformer_kernels.ops"} <= found


def test_the_packages_are_typed():
    import riformer
    import riformer_cli

    for package in (riformer_kernels, riformer, riformer_cli):
        assert (Path(package.__file__).parent / "py.typed").is_file()


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_the_library_uses_only_the_stable_abi():
    """No CPython symbol and no C++ symbol of torch: one build for every Python and every torch from 2.10 on."""
    output = subprocess.run(
        ["nm", "-D", "--undefined-only", str(_library())], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1].split("@")[0] for line in output.splitlines()]
    assert any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in symbols)
    forbidden = [s for s in symbols if re.match(r"_?Py|_ZNK?(3c10|2at|5torch|5caffe)", s)]
    assert not forbidden, f"these break with another torch or Python: {forbidden}"


def test_the_library_holds_no_path_of_the_machine_that_built_it():
    if not shutil.which("readelf"):
        pytest.skip("needs readelf (binutils)")
    dynamic = subprocess.run(["readelf", "-d", str(_library())], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_the_import_alone_makes_the_ops_run():
    """A program saved by torch.export calls the ops directly, with nothing but the import before it."""
    _library()
    code = "import torch, riformer_kernels; print(torch.ops.riformer.moments(torch.ones(1, 8, 2, 2))[0, 0, 0].item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1.0", done.stderr


def test_every_published_name_exists():
    for name in riformer_kernels.__all__:
        assert hasattr(riformer_kernels, name)


def test_an_unbuilt_library_is_a_reason_and_not_an_error(monkeypatch, tmp_path):
    note = tmp_path / "cpu_not_built.txt"
    note.write_text("not built: the package was installed with RIFORMER_CPU=off\n")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "libriformer_cpu.so")
    monkeypatch.setattr(cpu, "BUILD_NOTE", note)
    cpu._load.cache_clear()
    try:
        assert cpu.unusable() == "not built: the package was installed with RIFORMER_CPU=off"
        assert cpu.isa_status()["chosen"] is None
        with pytest.raises(riformer_kernels.BackendError, match="RIFORMER_CPU=off"):
            riformer_kernels.functional.backends.choose("auto", torch.device("cpu"), torch.float32)
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()


def test_a_file_that_is_no_library_is_a_reason_and_not_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "libriformer_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "LIBRARY", broken)
    cpu._load.cache_clear()
    try:
        assert "does not load" in cpu.unusable()
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()
