"""The ops of the engine at the shapes that S12 has at 224 px: ours, the eager form, and float64, on the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import riformer
import torch
from subject import LAYOUTS
from torch import Tensor, nn

from riformer_kernels import algebra, backends, numerics
from riformer_kernels.backends import Backend
from riformer_kernels.ops.block import BlockParameters

WIDTHS, SIDES, CLASSES = (64, 128, 320, 512), (56, 28, 14, 7), 1000
STAGES = tuple(zip(WIDTHS, SIDES, strict=True))
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "block": STAGES,
    "embed": ((3, 224), *STAGES[:3]),
    "norm": STAGES,
    "head": ((512, 7), (512, 12)),
    "moments": STAGES,
}
"""(channels, side) of the input: the four stages; for embed the image and the three downsamplings; for head the last
stage at 224 and at 384 px. Every op of ``ops.ALL`` has an entry, except those that work in place: ``block_`` is
``block`` written over its input, and a benchmark that repeated it would feed it its own output."""

BATCHES = (1, 16)
POOLED, MOST_DRAWS = 12_000, 24
MOMENT_UNITS = 4.0


@dataclass(frozen=True)
class OpCase:
    """One op on one input shape [batch, channels, side, side] in one dtype."""

    op: str
    channels: int
    side: int
    batch: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.side, self.side

    @property
    def stage(self) -> str | None:
        """What of S12 at 224 px this is; None for what the deployed network does inside other ops, or not at 224 px."""
        if self.op == "block":
            return f"stage {WIDTHS.index(self.channels) + 1}"
        if self.op == "embed":
            return "stem" if self.channels == 3 else f"downsampling {WIDTHS.index(self.channels) + 1}"
        return "head" if (self.op, self.side) == ("head", SIDES[-1]) else None

    @property
    def times(self) -> int:
        """How often S12 does it per forward."""
        if self.op == "block":
            return riformer.arch.ARCHS["s12"].layers[WIDTHS.index(self.channels)]
        return int(self.stage is not None)

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Built:
    """A case made ready.

    Attributes:
        ours: tokens and their moments to the result.
        module: tokens to the same, as the model's own code computes it; any floating dtype.
        flop: of its matrix products (2 per multiply-add), 0 where it has none.
        parameters: bytes of the parameters it reads.
        reads_tokens: False where the moments are enough.
        backend: who serves ours.
    """

    case: OpCase
    ours: Callable[[Tensor, Tensor], Tensor]
    module: nn.Module
    flop: int
    parameters: int
    reads_tokens: bool
    backend: Backend

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens (NCHW, as the CPU backend keeps them) and their moments."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(self.case.shape, generator=generator)
        offset = torch.randn((1, self.case.channels, 1, 1), generator=generator)
        x = (draw + 0.5 * offset).to(self.case.dtype)
        return x, self.backend.ops["moments"](x)

    def eager(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        """The eager form in both layouts."""
        found = {}
        for name, layout in (("eager", "NCHW"), ("eager_channels_last", "channels_last")):
            module = copy.deepcopy(self.module).to(memory_format=LAYOUTS[layout])
            laid_out = x.contiguous(memory_format=LAYOUTS[layout])
            found[name] = lambda module=module, laid_out=laid_out: module(laid_out)
        return found

    def comparable(self, result: Tensor) -> Tensor:
        """Ours in the module's units: centred sums of squares become variances, of the means' size."""
        if self.case.op == "moments":
            result[:, 1] /= self.case.side**2
        return result

    def yardstick(self, x: Tensor) -> Tensor:
        """What ours' error is compared with: the eager form."""
        if self.case.op == "moments":
            return self.comparable(algebra.moments_of(x.float()))
        return self.module(x)

    def bytes(self, result: Tensor) -> int:
        """The least that has to be moved: what is read and written, once."""
        tokens = self.case.dtype.itemsize * torch.Size(self.case.shape).numel() if self.reads_tokens else 0
        return tokens + result.numel() * result.element_size() + self.parameters

    @torch.inference_mode()
    def check(self) -> numerics.ErrorRatios:
        """The error-ratio rule, asserted; over several draws where one has few values, whose ratios scatter.

        Moments are asserted in units of rounding instead, as in the tests: PyTorch's ``var_mean`` accumulates in
        float64, so that its only error is the last rounding. Their ratios are those to the op's plain float32 form.
        """
        mine, theirs, golden, seed = [], [], [], 0
        exact = copy.deepcopy(self.module).double()
        while seed < MOST_DRAWS and sum(map(Tensor.numel, mine)) < POOLED:
            x, moments = self.inputs(seed)
            mine.append(self.comparable(self.ours(x, moments).clone()))
            theirs.append(self.yardstick(x))
            golden.append(exact(x.double()))
            if self.case.op == "moments":
                _assert_units(self.case, x, mine[-1], golden[-1])
            seed += 1
        found = numerics.compare(torch.cat(mine), torch.cat(theirs), torch.cat(golden))
        assert found.passed or self.case.op == "moments", (
            f"{self.case}: {found.exceeded}, ours {found.ours}, eager {found.eager}"
        )
        return found


def _assert_units(case: OpCase, x: Tensor, found: Tensor, golden: Tensor) -> None:
    """Asserts that the moments are off by a few units of float32's rounding at most.

    The unit of a mean is the rounding of its channel's largest value; that of a variance is this times the deviation.
    """
    largest = x.double().abs().amax((2, 3))
    scale = torch.stack((largest, largest * golden[:, 1].sqrt()), dim=1)
    units = ((found - golden).abs() / (2.0**-24 * scale)).max().item()
    assert units <= MOMENT_UNITS, f"{case}: a moment is off by {units:.1f} units of rounding, {MOMENT_UNITS} allowed"


class _Head(nn.Module):
    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.norm(x),))


class _Moments(nn.Module):
    """float32 moments (float64 for float64) as PyTorch computes them, but variances for sums of squares: [B, 2, C]."""

    def forward(self, x: Tensor) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(x.to(work), dim=(2, 3), correction=0)
        return torch.stack((mean, variance), dim=1)


@cache
def _model(dtype: torch.dtype) -> riformer.RIFormer:
    """S12's widths, one deployed block per stage, hard parameters."""
    arch = {"layers": [1] * len(WIDTHS), "embed_dims": list(WIDTHS)}
    model = riformer.RIFormer(arch, num_classes=CLASSES, deploy=True)
    return riformer.randomize_(model).to(dtype).eval()


def build(case: OpCase, backend: str = "auto", device: str = "cpu") -> Built:
    """Make ``case`` ready.

    Raises:
        BackendError: no backend serves it.
    """
    chosen = backends.choose(backend, torch.device(device), case.dtype)
    model = _model(case.dtype)
    ours, module, flop, reads = _BUILDERS[case.op](case, model, chosen)
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    return Built(case, ours, module, flop, parameters, reads, chosen)


_Parts = tuple[Callable[[Tensor, Tensor], Tensor], nn.Module, int, bool]


def _block(case: OpCase, model: riformer.RIFormer, backend: Backend) -> _Parts:
    block = model.network[2 * WIDTHS.index(case.channels)][0]
    first, second, mlp = block.norm_reparam, block.norm2, block.mlp
    arguments = BlockParameters(
        layer_scale_1=block.layer_scale_1, norm1_weight=first.weight, norm1_bias=first.bias, affine_weight=None,
        affine_bias=None, eps1=first.eps, norm2_weight=second.weight, norm2_bias=second.bias, eps2=second.eps,
        fc1_weight=mlp.fc1.weight, fc1_bias=mlp.fc1.bias, fc2_weight=mlp.fc2.weight, fc2_bias=mlp.fc2.bias,
        layer_scale_2=block.layer_scale_2, per_position=False, residual=True,
    )  # fmt: skip
    flop = 4 * mlp.fc1.weight.numel() * case.side**2 * case.batch
    return lambda x, moments: backend.ops["block"](x, moments, *arguments)[0], block, flop, True


def _embed(case: OpCase, model: riformer.RIFormer, backend: Backend) -> _Parts:
    index = (3, *WIDTHS).index(case.channels)
    module = model.patch_embed if index == 0 else model.network[2 * index - 1]
    conv = module.proj
    stride, padding = conv.stride[0], conv.padding[0]
    side = (case.side + 2 * padding - conv.kernel_size[0]) // stride + 1
    flop = 2 * conv.weight.numel() * side**2 * case.batch

    def ours(x: Tensor, moments: Tensor) -> Tensor:
        return backend.ops["embed"](x, conv.weight, conv.bias, stride, padding, case.dtype, True)[0]

    return ours, module, flop, True


def _norm(case: OpCase, model: riformer.RIFormer, backend: Backend) -> _Parts:
    norm = model.network[2 * WIDTHS.index(case.channels)][0].norm2

    def ours(x: Tensor, moments: Tensor) -> Tensor:
        return backend.ops["norm"](x, moments, norm.weight, norm.bias, norm.eps, False, case.dtype)

    return ours, norm, 0, True


def _head(case: OpCase, model: riformer.RIFormer, backend: Backend) -> _Parts:
    norm, fc = model.norm6, model.head.fc

    def ours(x: Tensor, moments: Tensor) -> Tensor:
        return backend.ops["head"](x, moments, norm.weight, norm.bias, norm.eps, fc.weight, fc.bias, False, case.dtype)

    return ours, _Head(norm, model.head), 2 * fc.weight.numel() * case.batch, False


def _moments(case: OpCase, model: riformer.RIFormer, backend: Backend) -> _Parts:
    return lambda x, moments: backend.ops["moments"](x), _Moments(), 0, True


_BUILDERS = {"block": _block, "embed": _embed, "norm": _norm, "head": _head, "moments": _moments}


def cases(op: str, dtypes: tuple[torch.dtype, ...], batches: tuple[int, ...] = BATCHES) -> list[OpCase]:
    """All shapes of ``op``."""
    return [
        OpCase(op, channels, side, batch, dtype)
        for dtype in dtypes
        for batch in batches
        for channels, side in SHAPES[op]
    ]
