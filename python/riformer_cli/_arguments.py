"""Argument types and texts that several commands share. No torch in here."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable

# Those of riformer_kernels.dtypes, written out because that module imports torch. A test compares them.
DTYPES = ("float32", "bfloat16", "float16")
# What a model can be computed in: a dtype, or int8 products of a bfloat16 model.
COMPUTE = (*DTYPES, "int8")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

EXIT_CODES = """\
exit codes:
  0    all went well
  1    a check failed, or some of the input could not be used (stderr says which)
  2    wrong usage or bad input, nothing was done
  130  interrupted with Ctrl-C (141: the reader of the output went away)"""


class Formatter(argparse.HelpFormatter):
    """Fills paragraphs, and leaves those with indented lines (examples, exit codes) as they are."""

    def __init__(self, prog: str) -> None:
        import shutil

        super().__init__(prog, max_help_position=28, width=min(100, shutil.get_terminal_size((100, 24)).columns - 2))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            as_it_is = any(line.startswith(" ") for line in paragraph.splitlines())
            if not as_it_is:
                paragraph = textwrap.fill(" ".join(paragraph.split()), width, break_on_hyphens=False)
            paragraphs.append(paragraph)
        return "\n\n".join(paragraphs)


def dtype(text: str) -> str:
    """argparse type: an entry of COMPUTE; "bf16" and the like are understood."""
    name = _SHORT.get(text.strip().lower(), text.strip().lower().removeprefix("torch."))
    if name not in COMPUTE:
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}; expected one of {', '.join(COMPUTE)}")
    return name


def several(kind: Callable) -> Callable:
    """argparse type: a list separated by commas, each entry once, in the order given."""

    def parse(text: str) -> list:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))

    return parse


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """argparse type: an integer within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, found {text!r}") from None
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {bounds}, found {value}")
        return value

    return parse


def number(above: float, most: float) -> Callable[[str], float]:
    """argparse type: a number greater than ``above`` and at most ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None
        if not above < value <= most:
            raise argparse.ArgumentTypeError(f"expected more than {above:g} and at most {most:g}, found {text}")
        return value

    return parse


def add_format(parser: argparse.ArgumentParser, *formats: str) -> None:
    """``--format``; the first is the default."""
    parser.add_argument("--format", choices=formats, default=formats[0], help=f"of the result (default: {formats[0]})")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """``--backend``."""
    parser.add_argument(
        "--backend", metavar="NAME", default="auto", help="auto, or one of those that 'info' lists (default: auto)"
    )


def add_norm(parser: argparse.ArgumentParser) -> None:
    """``--norm``, which no tensor of a checkpoint tells."""
    parser.add_argument(
        "--norm",
        choices=("gn", "ln"),
        help="norm of the network: gn (GroupNorm with one group, RIFormer's own) or ln (LayerNorm of each position). "
        "Default: what the checkpoint's metadata says, else gn",
    )
