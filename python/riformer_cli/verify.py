"""``riformer-kernels verify``: are the fused kernels as accurate as eager PyTorch, on this machine?"""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING, Any

from ._arguments import DTYPES, EXIT_CODES, add_backend, add_format, add_norm, dtype, integer, several
from ._models import arch_name, compute_dtype, machine, random_model, read, served_by, torch_dtype
from ._output import document, progress, table

if TYPE_CHECKING:
    import torch
    from riformer import RIFormer

    from riformer_kernels.numerics import ErrorRatios

SUMMARY = "check the numbers against float64, per dtype; exit 1 if they are too far off"
DESCRIPTION = """\
Patch a RIFormer and compare it with float64, for each dtype.

Golden is the original model in float64 on input and parameters rounded to the dtype. The error of the
patched model and that of eager PyTorch are both taken against it, and judged by their ratio: the
largest error (limit 2x), the root mean square (1.25x; float32 2x), the RMS of the worst channel (2x)
and that of the worst position (3x). Compared are the features before pooling and the logits, both at
--image-size, and every block's branch before the residual, where no small layer scale hides a defect.

Without --checkpoint the parameters are random and hard: with fresh ones every block is almost the
identity and any kernel passes."""
EPILOG = f"""\
examples:
  riformer-kernels verify
  riformer-kernels verify --arch m36 --dtype bfloat16 --image-size 384 --batch 1
  riformer-kernels verify --checkpoint weights.safetensors --format json

{EXIT_CODES}"""

FIGURES = ("rms", "max", "channel", "position")
# The error of few logits is a matter of luck; rows of the same kind are added up to this many.
CLASSES = 1024
MORE_BATCHES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--arch", metavar="NAME", help="s12, s24, s36, m36 or m48, random parameters (default: s12)")
    source.add_argument("--checkpoint", metavar="FILE", help="checkpoint file, or published name (downloads)")
    add_norm(parser)
    parser.add_argument(
        "--dtype",
        type=several(dtype),
        default=list(DTYPES),
        metavar="LIST",
        help=f"dtypes, separated by commas, or int8 (default: {','.join(DTYPES)})",
    )
    parser.add_argument("--image-size", type=integer(3), default=224, metavar="N", help="side in pixels (default: 224)")
    parser.add_argument("--batch", type=integer(1), default=2, metavar="N", help="images (default: 2)")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of parameters and images (default: 0)")
    add_backend(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--deploy", dest="deploy", action="store_true", default=None, help="verify the deployed form")
    form.add_argument(
        "--training-form",
        dest="deploy",
        action="store_false",
        help="verify the training-time form (default: the checkpoint's own; without one, deployed)",
    )
    add_format(parser, "text", "json")


def run(arguments: argparse.Namespace) -> int:
    model, what = _model(arguments)
    results = []
    with progress("verifying", len(arguments.dtype)) as advance:
        for name in arguments.dtype:
            advance(0, f"verifying {name}")
            results.append(_verify(model, name, arguments))
            advance()
    passed = all(result["passed"] for result in results)
    if arguments.format == "json":
        settings = {key: getattr(arguments, key) for key in ("image_size", "batch", "seed")}
        document({"passed": passed, "model": what, **settings, "machine": machine(), "results": results})
    else:
        _print(what, results, arguments)
    return 0 if passed else 1


def _model(arguments: argparse.Namespace) -> tuple[RIFormer, dict[str, Any]]:
    if arguments.checkpoint:
        source = read(arguments.checkpoint)
        options = {} if arguments.deploy is None else {"deploy": arguments.deploy}
        model = source.build(arguments.norm, **options)
        parameters = str(source.path)
    else:
        deploy = arguments.deploy is not False
        model = random_model(arguments.arch or "s12", arguments.seed, deploy=deploy, norm=arguments.norm or "gn")
        parameters = f"hard random, seed {arguments.seed}"
    form = "deployed" if model.deploy else "training-time"
    return model, {"arch": arch_name(model.arch), "form": form, "norm": model.norm_type, "parameters": parameters}


def _verify(model: RIFormer, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All comparisons in one dtype."""
    import riformer_kernels
    from riformer_kernels import verification

    eager = copy.deepcopy(model).to(torch_dtype(name))
    if eager.num_classes:
        _widen(eager, arguments.seed)
    ours, golden = copy.deepcopy(eager), copy.deepcopy(eager).double()
    handle = riformer_kernels.patch(ours, compute_dtype=compute_dtype(name), backend=arguments.backend, verify=False)
    headless = _headless(eager)
    riformer_kernels.patch(headless, compute_dtype=compute_dtype(name), backend=arguments.backend, verify=False)
    rows = _whole((headless, ours), eager, golden, name, arguments)
    # What patch() itself would have checked; its whole-network rows are shown only if they fail.
    own = verification.verify(ours)
    size = "x".join(str(side) for side in own.shape[2:])
    small = [(f"{item.name} at {size}", item.batches, item.ratios) for item in own.network]
    branches = [(item.name, item.batches, item.ratios) for item in own.branches]
    entries = [
        {"name": label, "kind": kind, "batches": batches, **ratios.as_dict(), "exceeded": ratios.exceeded}
        for kind, group in (("network", rows), ("patch", small), ("branch", branches))
        for label, batches, ratios in group
    ]
    return {
        "dtype": name,
        "backend": served_by(handle),
        "passed": all(entry["passed"] for entry in entries),
        "comparisons": entries,
    }


def _widen(model: RIFormer, seed: int) -> None:
    """Add random rows of the same size to a classifier of few classes, so that its error is no matter of luck."""
    import torch

    fc = model.head.fc
    extra = CLASSES - fc.out_features
    if extra <= 0:
        return
    generator = torch.Generator().manual_seed(seed)
    for name, value in list(fc.named_parameters()):
        size = value.detach().double().square().mean().sqrt().item()
        rows = torch.randn((extra, *value.shape[1:]), generator=generator) * size
        fc.register_parameter(name, torch.nn.Parameter(torch.cat((value.detach(), rows.to(value.dtype)))))
    fc.out_features = CLASSES


def _whole(
    patched: tuple[RIFormer, RIFormer], eager: RIFormer, golden: RIFormer, name: str, arguments: argparse.Namespace
) -> list[tuple[str, int, ErrorRatios]]:
    """Features and logits at the asked size; ``patched``: without and with classifier.

    What exceeds a limit is judged again, on more batches together.
    """
    import torch

    from riformer_kernels import numerics

    kind = next(eager.parameters()).dtype
    batches: list[list[tuple[torch.Tensor, ...]]] = []

    def sample() -> None:
        generator = torch.Generator().manual_seed(arguments.seed + len(batches))
        shape = (arguments.batch, eager.in_channels, arguments.image_size, arguments.image_size)
        x = torch.randn(shape, generator=generator).to(kind)
        ours = patched[0](x) + ((patched[1](x),) if eager.num_classes else ())
        batches.append(list(zip(ours, _original(eager, x), _original(golden, x.double()), strict=True)))

    def judge(index: int) -> ErrorRatios:
        ours, eager, golden = (torch.cat(values) for values in zip(*(batch[index] for batch in batches), strict=True))
        return numerics.compare(ours, eager, golden, limits=limits[index])

    with torch.inference_mode():
        sample()
        kinds = ["features"] * len(eager.out_indices) + ["logits"] * bool(eager.num_classes)
        labels = [f"features norm{index}" for index in eager.out_indices] + (["logits"] if eager.num_classes else [])
        limits = [numerics.limits_for(getattr(torch, name), label) for label in kinds]
        results = [(label, 1, judge(index)) for index, label in enumerate(labels)]
        if not all(ratios.passed for _, _, ratios in results):
            for _ in range(MORE_BATCHES):
                sample()
            for index, (label, _, ratios) in enumerate(results):
                if not ratios.passed:
                    results[index] = (label, len(batches), judge(index))
    return results


def _original(model: RIFormer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Features and logits of an unpatched model."""
    features = model.forward_features(x)
    return (*features, model.head(features)) if model.num_classes else features


def _headless(model: RIFormer) -> RIFormer:
    """A twin with the same parameters that returns features."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if twin.num_classes:
        del twin.head
        twin.num_classes = 0
    return twin


def _print(what: dict[str, Any], results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    print(f"RIFormer {what['arch']}, {what['form']}, norm {what['norm']}; parameters: {what['parameters']}")
    print(
        f"{arguments.batch} images of {arguments.image_size} x {arguments.image_size}; errors against float64, and the "
        "patched model's as a multiple of eager's\n"
    )
    rows = []
    for result in results:
        network = [
            e for e in result["comparisons"] if e["kind"] == "network" or (e["kind"] == "patch" and not e["passed"])
        ]
        branches = [entry for entry in result["comparisons"] if entry["kind"] == "branch"]
        worst = sorted(branches, key=lambda entry: (entry["passed"], -entry["rms"]))
        failed = sum(not entry["passed"] for entry in branches)
        for entry in [*network, *worst[: max(1, failed)]]:
            label = entry["name"]
            if entry["kind"] == "branch":
                label = f"branch {label}" + ("" if failed else f" (worst of {len(branches)})")
            ratios = [f"{entry[figure]:.2f}x / {entry['limits'][figure]:g}" for figure in FIGURES]
            errors = [f"{entry[side]['rms']:.1e}" for side in ("ours", "eager")]
            verdict = "passed" if entry["passed"] else "FAILED"
            rows.append((result["dtype"], label, *errors, *ratios, verdict))
    header = ("dtype", "compared", "our rms", "eager rms", *(f"{figure} / limit" for figure in FIGURES), "verdict")
    table(header, rows, right=range(2, 8))
    print()
    for result in results:
        bad = [entry["name"] for entry in result["comparisons"] if not entry["passed"]]
        verdict = f"FAILED: {', '.join(bad)}" if bad else f"passed, {len(result['comparisons'])} comparisons"
        print(f"{result['dtype']} on {result['backend']}: {verdict}")
