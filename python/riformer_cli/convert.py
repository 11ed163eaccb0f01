"""``riformer-kernels convert``: a checkpoint into safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._arguments import EXIT_CODES, add_format, add_norm
from ._models import Source, arch_name
from ._output import CliError, document, note, printable, progress

SUMMARY = "a checkpoint (.pth or safetensors) to safetensors"
DESCRIPTION = """\
Convert a checkpoint to safetensors and print what is in it with the new file's sha256.

IN is a .pth of PyTorch or mmpretrain (never executed: a pickle that names anything but tensors and
plain containers is refused) or a .safetensors. The prefixes 'backbone.', 'module.' and '_orig_mod.'
are taken out of the names; values and dtypes stay as they are. OUT appears whole or not at all."""
EPILOG = f"""\
examples:
  riformer-kernels convert riformer-s12_in1k.pth s12.safetensors
  riformer-kernels convert run/epoch_300.pth s12.safetensors --deploy --which ema_state_dict

{EXIT_CODES}"""

# What save_checkpoint writes anew from the tensors; everything else of the input's metadata is kept.
_DERIVED = {"arch", "form", "format"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="checkpoint to read")
    parser.add_argument("output", metavar="OUT", help="safetensors file to write")
    parser.add_argument(
        "--deploy",
        action="store_true",
        help="fold the affine stand-ins for the token mixer into the norms (inference form)",
    )
    parser.add_argument(
        "--which",
        choices=("auto", "state_dict", "ema_state_dict"),
        default="auto",
        help="part of a .pth to take (default: auto, state_dict where there is one; mmengine's EMAHook has already put "
        "the averaged weights there)",
    )
    add_norm(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_format(parser, "text", "json")


def run(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    _check_output(output, arguments.force)
    with progress(f"converting {arguments.input}", None):
        found = _convert(arguments, output)
    if arguments.format == "json":
        document(found)
        return 0
    rows = {
        "wrote": found["output"],
        "arch": f"{found['arch'] or 'not recognised'}" + (f", {found['form']}" if found["form"] else ""),
        "tensors": f"{found['tensors']}",
        "parameters": f"{found['parameters']:,}",
        "dtypes": ", ".join(found["dtypes"]),
        "bytes": f"{found['bytes']:,}",
        "sha256": found["sha256"],
    }
    if arguments.deploy:
        rows["folded"] = f"{found['folded']} blocks" if found["folded"] else "0 blocks: it was deployed already"
    for name, value in rows.items():
        print(f"{name:<11} {printable(value)}")
    return 0


def _check_output(output: Path, force: bool) -> None:
    """Everything that can be known before the input is read."""
    if output.is_dir():
        raise CliError(f"OUT {output} is a directory; expected a file name such as {output / 'model.safetensors'}")
    if output.suffix.lower() != ".safetensors":
        raise CliError(f"OUT {output}: what is written is safetensors; expected a name that ends in .safetensors")
    if output.exists() and not force:
        raise CliError(f"OUT {output} exists; --force replaces it")
    if not output.parent.is_dir():
        raise CliError(f"OUT {output}: there is no folder {output.parent}; create it first")


def _convert(arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    import riformer

    path = Path(arguments.input)
    state_dict = riformer.load_checkpoint(path, arguments.which)
    metadata = riformer.read_metadata(path)
    kept = {key: value for key, value in metadata.items() if key not in _DERIVED}
    try:
        source = Source(path, state_dict, riformer.infer_arch(state_dict), metadata)
    except riformer.CheckpointError as error:
        if arguments.deploy:
            raise CliError(f"--deploy: {path}: {error}. Only a RIFormer can be folded") from error
        note(f"warning: {path}: {error}; converted all the same")
        source = None
    folded = 0
    if source is not None:
        norm = source.norm_options(arguments.norm)
        if arguments.norm or "norm" in metadata:
            kept |= {"norm": norm["norm"], "norm_eps": repr(norm["norm_eps"])}
        else:
            note(f"{path} does not say its norm; GroupNorm(1) is assumed when it is loaded, --norm ln notes the other")
        if arguments.deploy:
            state_dict, folded = _deployed(source, norm)
    sha256 = riformer.save_checkpoint(state_dict, output, metadata=kept)
    form = None if source is None else "deployed" if arguments.deploy or source.info.deploy else "training-time"
    return {
        "input": str(path),
        "output": str(output),
        "arch": None if source is None else arch_name(source.info.arch),
        "form": form,
        "tensors": len(state_dict),
        "parameters": sum(tensor.numel() for tensor in state_dict.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()}),
        "folded": folded,
        "bytes": output.stat().st_size,
        "sha256": sha256,
        "metadata": riformer.read_metadata(output),
    }


def _deployed(source: Source, norm: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The state dict in its deployed form and dtype, and how many blocks were folded for it."""
    import riformer

    from ._models import bad_values

    dtypes = {tensor.dtype for tensor in source.state_dict.values()}
    with bad_values(source.path):
        model = source.info.build(deploy=True, **norm)
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    else:
        note(
            f"{source.path} mixes {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}; "
            "written as float32"
        )
    result = riformer.load_into(model, source.state_dict)
    return model.state_dict(), result.folded
