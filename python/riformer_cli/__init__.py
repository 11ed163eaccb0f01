"""The command line ``riformer-kernels``: info, verify, predict, convert, bench.

A package of its own, because importing ``riformer_kernels`` imports torch, which takes seconds. The modules here import
torch and the engine inside the functions that need them, so ``--help`` and a usage error need neither.

Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from . import bench, convert, info, predict, verify
from ._arguments import EXIT_CODES, Formatter
from ._output import CliError, printable, report_error

COMMANDS = (info, verify, predict, convert, bench)
_PIPE_CLOSED, _INTERRUPTED = 141, 130

_EPILOG = f"""\
examples:
  riformer-kernels info
  riformer-kernels verify --arch s12
  riformer-kernels predict photos/ --checkpoint weights.safetensors --topk 3
  riformer-kernels convert published.pth weights.safetensors --deploy
  riformer-kernels bench --arch s12 --batch 1,16

'riformer-kernels COMMAND --help' describes a command.

{EXIT_CODES}"""


class _Version(argparse.Action):
    """``--version``, looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_arguments: object) -> NoReturn:
        print(f"riformer-kernels {_version()}")
        parser.exit()


def _version() -> str:
    """The installed package's version; of a source tree that is not installed, what its source says."""
    from importlib import metadata

    try:
        return metadata.version("riformer-kernels")
    except metadata.PackageNotFoundError:
        import riformer_kernels

        return riformer_kernels.__version__


def parser() -> argparse.ArgumentParser:
    """The whole command line as argparse sees it."""
    top = argparse.ArgumentParser(
        prog="riformer-kernels",
        description="Fused inference kernels for RIFormer: look at the machine, check the numbers, classify "
        "images, convert checkpoints, measure.",
        epilog=_EPILOG,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action=_Version)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        sub = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=Formatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see ``--help``), also after ``--help`` and usage errors."""
    with _printable_streams():
        try:
            code = _dispatch(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            _abandon_stdout()
            return _PIPE_CLOSED
        except KeyboardInterrupt:
            print("riformer-kernels: interrupted", file=sys.stderr)
            return _INTERRUPTED


def _dispatch(argv: Sequence[str] | None) -> int:
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        raise
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise  # A defect of ours: the traceback is what helps.
        report_error(_text(error))
        return code


def _exit_code(error: Exception) -> int | None:
    """What to exit with for an error that is the user's to solve, None for any other."""
    if isinstance(error, CliError):
        return error.code
    if isinstance(error, OSError):
        return 2
    # Nobody can have raised an error of a module that is not imported.
    known = {"riformer_kernels.errors": "RIFormerKernelsError", "riformer.safe_pickle": "CheckpointError"}
    for module, name in known.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return 1 if type(error).__name__ == "VerificationError" else 2
    return None


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{printable(str(error.filename))}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _printable_streams() -> Iterator[None]:
    """File names and labels that the terminal's encoding lacks are escaped rather than fatal."""
    changed = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            changed.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in changed:
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def _abandon_stdout() -> None:
    """Let the interpreter's last flush go nowhere: the reader (``| head``) has left."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


__all__ = ["main", "parser"]
