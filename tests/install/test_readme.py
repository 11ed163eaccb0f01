"""README.md does what it says: its Python blocks run, its commands exist with those options, its links lead somewhere.

The wording and the number of the blocks are free. A block may use the names of `PREPARED` without defining them; the
first block may not, as it is what a reader tries after the installation.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
import urllib.parse
from importlib.util import find_spec
from pathlib import Path

import pytest
import riformer
import torch
from riformer import zoo
from support_cases import draws
from support_mmpretrain import import_mmpretrain
from support_paths import ROOT
from support_readme import README, Block, commands, fences, free_names, links, python_blocks

import riformer_kernels

TEXT = README.read_text()
BLOCKS = python_blocks(TEXT)
SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS))
COMMANDS = commands(TEXT)
PROJECT = (ROOT / "pyproject.toml").read_text()
# The package of the command line, as the installation names it.
COMMAND_LINE = importlib.import_module(re.search(r'^riformer-kernels = "([\w.]+):main"', PROJECT, re.MULTILINE)[1])

# ------------------------------------------------------------------------------------------------------ Python blocks


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for a published checkpoint: an S12 with random parameters, as mmpretrain saves a classifier."""
    model = riformer.randomize_(riformer.RIFormer("s12", num_classes=1000), 0)
    state = {
        name if name.startswith("head.fc") else f"backbone.{name}": value for name, value in model.state_dict().items()
    }
    path = tmp_path_factory.mktemp("published") / "s12.pth"
    torch.save({"state_dict": state}, path)
    return path


@pytest.fixture
def no_network(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads, and nothing else, are replaced: they write the file that stands for the published S12."""

    def copy(url: str, target: str | Path) -> None:
        assert "s12" in urllib.parse.urlparse(url).path, f"README downloads {url}; this test has an S12 only"
        Path(target).write_bytes(published.read_bytes())

    def fetch(url: str, path: Path, progress: bool) -> str:
        copy(url, path)
        return next(entry.sha256_prefix for entry in zoo.ZOO.values() if entry.url == url)

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(zoo, "_fetch", fetch)  # riformer's
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, target, *_, **__: copy(url, target)
    )  # mmengine's
    monkeypatch.chdir(tmp_path)  # where a block may write


def tokens() -> torch.Tensor:
    return draws(0, torch.float32)(2, 64, 14, 14)


def unit_parameter(name: str) -> torch.Tensor:
    """A parameter of `norm_mlp` for `tokens`."""
    shapes = {"fc1_weight": (256, 64), "fc1_bias": (256,), "fc2_weight": (64, 256)}
    return draws(1, torch.float32)(*shapes.get(name, (64,)), std=0.1)


# What blocks after the first may use as if the reader had made it.
PREPARED = {
    "torch": lambda: torch,
    "riformer": lambda: riformer,
    "riformer_kernels": lambda: riformer_kernels,
    "model": lambda: riformer.randomize_(riformer.RIFormer("s12", num_classes=1000), 0).eval(),
    "images": lambda: torch.rand(3, 3, 224, 224),
    "x": tokens,
    **{
        name: lambda name=name: unit_parameter(name)
        for name in inspect.signature(riformer_kernels.norm_mlp).parameters
        if name.endswith(("_weight", "_bias")) or name == "layer_scale"
    },
}


def run(block: Block, names: dict[str, object], prepare: bool) -> None:
    if re.search(r"^\s*(import|from) mmpretrain", block.code, re.MULTILINE):
        import_mmpretrain()
    if re.search(r"\.cuda\(|[\"']cuda", block.code) and not torch.cuda.is_available():
        pytest.skip(f"README.md:{block.line} needs a GPU")
    missing = free_names(block.code) - names.keys()
    if prepare:
        names |= {name: PREPARED[name]() for name in missing & PREPARED.keys()}
        missing -= PREPARED.keys()
    assert not missing, f"README.md:{block.line} uses {sorted(missing)}, which nothing defines"
    # Line numbers in a traceback are README's.
    exec(compile("\n" * (block.line - 1) + block.code, str(README), "exec"), names)


def test_the_first_block_runs_as_it_stands(no_network):
    names: dict[str, object] = {}
    run(BLOCKS[0], names, prepare=False)
    assert any(isinstance(value, torch.Tensor) for value in names.values()), "it computes something"


@pytest.mark.parametrize("section", SECTIONS)
def test_the_blocks_of_a_section_run_in_order(no_network, section):
    names: dict[str, object] = {}
    for block in BLOCKS:
        if block.section == section:
            run(block, names, prepare=block is not BLOCKS[0])
    assert names


# ----------------------------------------------------------------------------------------------------------- commands


def option_names(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("-") and word != "-"]


def check_module(words: list[str]) -> None:
    """``python -m MODULE`` or ``python FILE``, with options that its ``--help`` knows."""
    if words[0] == "-m":
        assert find_spec(words[1]), f"there is no module {words[1]}"
        target, rest = words[:2], words[2:]
    else:
        assert (ROOT / words[0]).is_file(), f"there is no file {words[0]}"
        target, rest = words[:1], words[1:]
    if wanted := option_names(rest):
        done = subprocess.run([sys.executable, *target, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not [name for name in wanted if name not in done.stdout], f"{words}: {done.stdout}"


def check_pytest(words: list[str], config: pytest.Config) -> None:
    """Its files exist, and it takes these options here."""
    known = config._parser.parse_known_args(words)
    for name in known.file_or_dir:
        assert (ROOT / name.partition("::")[0]).exists(), f"there is no {name}"
    if known.markexpr:
        names = set(re.findall(r"\w+", known.markexpr)) - {"not", "and", "or"}
        assert names <= {marker.partition(":")[0] for marker in config.getini("markers")}, known.markexpr


def check_pip(words: list[str]) -> None:
    """The extras that it installs exist."""
    section = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    for extras in re.findall(r"(?:riformer-kernels|\.)\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= known, extras


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"\$\({name}\)" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {word}"


def check_command(command: str, config: pytest.Config) -> None:
    program, *words = shlex.split(command)
    if program == "riformer-kernels":
        if words != ["COMMAND", "--help"]:
            COMMAND_LINE.parser().parse_args(words)
    elif program == "make":
        check_make(words)
    elif program == "pip" or words[:2] == ["-m", "pip"]:
        check_pip(words)
    elif program == "pytest" or words[:2] == ["-m", "pytest"]:
        check_pytest(words[2:] if words[0] == "-m" and program != "pytest" else words, config)
    else:
        check_module(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_with_these_options(command, request):
    check_command(command, request.config)


def test_the_commands_are_found():
    assert {command.split()[0] for command in COMMANDS} >= {"riformer-kernels", "make", "pip"}


@pytest.mark.parametrize(
    "command",
    ["riformer-kernels explain", "riformer-kernels bench --speed 3", "make tea", "make bench SUGAR=2",
     "python bench/nothing.py", "python bench/gpu.py --sugar", "python -m riformer_kernels.nothing",
     "pytest -m nothing", "pytest tests/nothing.py", 'pip install ".[nothing]"'],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_noticed(command, request):
    with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError)):
        check_command(command, request.config)


# -------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("link", links(TEXT))
def test_a_link_leads_to_a_file(link):
    assert (ROOT / link).exists()


def test_blocks_are_found_with_their_sections():
    text = "# A\n```python\nx = 1\n```\n## B\n```sh\nmake test  # all\n```\n    pip install .\n```python\ny\n```\n"
    assert [fence[:3] for fence in fences(text)] == [("A", "python", 3), ("B", "sh", 7), ("B", "python", 11)]
    assert [block.code for block in python_blocks(text)] == ["x = 1", "y"]
    assert commands(text) == ["make test", "pip install ."]
    assert free_names("import a.b\nc = a.b(d)\nprint(c, [e for e in f])") == {"d", "f"}
