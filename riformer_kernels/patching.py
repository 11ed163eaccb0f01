"""``patch``, its handle, and ``unpatch``: the whole public surface for people who have a model."""

from __future__ import annotations

import contextlib
import threading
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import backends, dtypes, verification, warmup
from .errors import BackendError, PatchError, VerificationError
from .fused import FusedBackbone, adopt, release
from .modules import STATE, Backbone, original_class
from .patch_state import PatchState
from .plan import BackbonePlan, EmbedPlan, HeadPlan, NormPlan, StagePlan, own_first_half
from .recognise import find, why_not_backbone

_lock = threading.RLock()
_OUTSIDE = "not part of the backbone: runs as before"


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        name: the module's name in the model that was passed to ``patch``.
        kind: "stem", "stage", "downsample", "norm", "head", or "outside" for what is not part of a backbone.
        backend: name and detail (instruction set) of the backend, None when nothing of it is fused.
        dtype: dtype of the tokens, or int8.
        fused, total: number of blocks, or 0/1 of 1 for the other kinds. A block counts whose second half is fused.
        reason: why part of it is not fused, None when all is.
    """

    name: str
    kind: str
    backend: str | None
    dtype: str | None
    fused: int
    total: int
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Handle:
    """What ``patch`` did to a model; ``print`` it, look at ``report`` and ``verification``, ``restore()`` it.

    As a context manager it restores on leaving, also after an exception, the modules that its own ``patch`` call
    patched. (An inner ``with patch(model)`` on a patched model therefore leaves the outer one in force.)
    """

    def __init__(self, model: nn.Module, backbones: list[tuple[str, Backbone]], own: list[nn.Module]) -> None:
        self.model = model
        self._backbones = backbones
        self._own = own
        self._frozen: list[Row] | None = None
        self._last_verification: dict[str, verification.Verification] | None = None

    @property
    def report(self) -> list[Row]:
        """The rows as of now: a hook or a dropout that came after patching shows. After ``restore``: the last rows."""
        if self._frozen is not None and not self.active:
            return self._frozen
        rows = [row for name, backbone in self._backbones for row in _rows(name, backbone)]
        return rows + _outside(self.model, self._backbones)

    @property
    def verification(self) -> dict[str, verification.Verification] | None:
        """Figures per backbone name, or None when patched with ``verify=False``."""
        found = {name: _state(backbone).verification for name, backbone in self._live()}
        figures = {name: value for name, value in found.items() if value is not None}
        return figures or self._last_verification

    @property
    def active(self) -> bool:
        """Whether any backbone of this handle is patched."""
        return bool(self._live())

    def _live(self) -> list[tuple[str, Backbone]]:
        return [(name, backbone) for name, backbone in self._backbones if isinstance(backbone, FusedBackbone)]

    def restore(self) -> None:
        """Give every backbone its class back. Calling it again does nothing."""
        self._restore([backbone for _, backbone in self._backbones])

    def _restore(self, modules: list[nn.Module]) -> None:
        with _lock:
            if self.active:
                self._frozen, self._last_verification = self.report, self.verification
            for module in modules:
                release(module)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore(self._own)

    def __str__(self) -> str:
        rows = self.report
        fused = sum(row.fused for row in rows if row.kind == "stage")
        total = sum(row.total for row in rows if row.kind == "stage")
        state = "" if self.active else " (restored)"
        name = original_class(self.model).__name__
        lines = [f"riformer_kernels: {fused} of {total} blocks fused in {name}{state}", ""]
        lines += _table(
            ("module", "kind", "backend", "dtype", "fused", "reason"),
            [
                (r.name or "(model)", r.kind, r.backend or "-", r.dtype or "-", f"{r.fused}/{r.total}", r.reason or "")
                if r.kind != "outside"
                else (r.name, r.kind, "-", "-", "-", r.reason or "")
                for r in rows
            ],
        )
        for name, figures in (self.verification or {}).items():
            lines += ["", f"verification{' of ' + name if name else ''}: {figures.summary()}", *figures.lines()]
        if self.verification is None:
            lines += ["", "verification: not run (verify=False)"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        names = ", ".join(repr(name) for name, _ in self._backbones)
        return f"<riformer_kernels.Handle of {type(self.model).__name__}, backbones [{names}], active={self.active}>"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = tuple("-" * width for width in widths)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, rule, *rows)
    ]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _state(backbone: nn.Module) -> PatchState:
    """The state of a patched backbone."""
    return backbone.__dict__[STATE]


def _rows(prefix: str, backbone: Backbone) -> list[Row]:
    state: PatchState | None = backbone.__dict__.get(STATE)
    if state is None:
        return [Row(prefix, "stage", None, None, 0, 0, "restored: this backbone runs its original forward")]
    program = state.program_for(backbone)
    plan, lead = program.plan, program.lead()
    dtype = state.compute_dtype or lead.dtype
    dtype_name = dtypes.name_of(dtype)
    try:
        backend = state.backend_for(lead.device, dtype)
    except BackendError as error:
        return [Row(prefix, "stage", None, dtype_name, 0, 0, str(error))]
    served = backend.served(dtype)

    def row(part: EmbedPlan | NormPlan | HeadPlan, kind: str) -> Row:
        ok = part.reason is None
        return Row(_join(prefix, part.name), kind, served if ok else None, dtype_name, int(ok), 1, part.reason)

    rows = [row(plan.stem, "stem")]
    for item in plan.network:
        if not isinstance(item, StagePlan):
            rows.append(row(item, "downsample"))
            continue
        fused = 0 if item.reason else sum(block.reason is None for block in item.blocks)
        reasons: dict[str, list[str]] = {}
        for block in item.blocks:
            if text := block.reason or own_first_half(block):
                reasons.setdefault(text, []).append(block.name.rpartition(".")[2])
        parts = [f"{'blocks' if len(at) > 1 else 'block'} {', '.join(at)}: {reason}" for reason, at in reasons.items()]
        reason = item.reason or "; ".join(parts) or None
        name = _join(prefix, item.name)
        rows.append(Row(name, "stage", served if fused else None, dtype_name, fused, len(item.blocks), reason))
    rows += [row(norm, "norm") for norm in plan.norms]
    return rows + ([row(plan.head, "head")] if plan.head is not None else [])


def _outside(model: nn.Module, backbones: list[tuple[str, Backbone]]) -> list[Row]:
    """Siblings of the backbones and of the modules around them: necks, heads, preprocessors. They stay as they are."""
    rows = {}
    around = {name.rpartition(".")[0] for name, _ in backbones if name}
    around |= {".".join(path.split(".")[:i]) for path in set(around) for i in range(len(path.split(".")))}
    inside = [name for name, _ in backbones]
    for path in sorted(around):
        for name, module in model.get_submodule(path)._modules.items():
            full = _join(path, name)
            if module is not None and not any(other == full or other.startswith(full + ".") for other in inside):
                rows[full] = Row(full, "outside", None, None, 0, 0, f"{type(module).__name__}, {_OUTSIDE}")
    return list(rows.values())


def patch(
    model: nn.Module,
    *,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    strict: bool = True,
    verify: bool = True,
    image_size: int | tuple[int, int] = warmup.IMAGE_SIZE,
) -> Handle:
    """Make every RIFormer backbone in ``model`` compute the same function through fused kernels, in place.

    Only the forward of each backbone changes (``type(backbone)`` becomes a subclass); parameters stay where they are,
    and each call reads them anew, so no weight is ever stale. Methods other than ``forward`` are the original's.

    - Where gradients are due (grad enabled, and the input or a parameter requires them) the original forward runs and
      says so once. Use ``torch.inference_mode()`` or ``torch.no_grad()`` for the fused one.
    - A block whose dropout becomes active, or that gets a hook, after patching runs its own modules from then on, and
      a warning says so once; ``handle.report`` shows it.
    - Results have the original's dtype and memory format; under ``torch.autocast`` too.

    Args:
        model: a RIFormer (ours, mmpretrain's, or one of the same structure), or a module that contains one or more.
        backend: "auto" for the native kernels of the model's device, or a backend's name: "cpu", "triton", "cuda" (CUDA
            C++, where "auto" prefers Triton), or "reference" (plain PyTorch).
        compute_dtype: dtype of the tokens inside, such as ``torch.bfloat16`` for a float32 model; inputs and results
            stay in the parameters' dtype. Default: the parameters' dtype. ``torch.int8``, on the CPU: tokens in
            bfloat16, and the products of the blocks in int8, quantised from the float parameters in each call
            (``quantise``). Its errors have limits of their own (``numerics``), and a weight that is not finite raises
            a RuntimeError at the call.
        strict: raise unless every part of the backbone is fused. The neck and head around an mmpretrain backbone are
            not parts of it; the ``head.fc`` of a module that is backbone and classifier in one is. False: patch what
            can be, the report gives the reasons for the rest.
        verify: compare one seeded batch with float64 and eager PyTorch by the error-ratio rule, see ``verification``.
            With False the backbone's own ``forward`` is trusted to be RIFormer's (its parts are still probed).
        image_size: side of the images, or (height, width), in pixels: a backend that compiles its kernels at first use
            (Triton's) does so now, for this size, with a line on stderr. Other sizes work, and may compile when they
            come. No other backend looks at it.

    Returns:
        The handle. A model that is patched already with the same options gives an equivalent handle.

    Raises:
        PatchError: not a RIFormer, mixed dtypes or devices, a meta or quantized model, a part that cannot be fused
            (``strict``), or patched already with other options.
        BackendError: no usable backend for the model's device and dtype.
        VerificationError: the numbers are too far off.
        In all of these cases the model is exactly as it was.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(f"expected a torch.nn.Module that contains a RIFormer, found {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise PatchError(
            "found a torch.jit.ScriptModule, whose forward is compiled; patch the model before scripting it"
        )
    if compute_dtype is not None and not isinstance(compute_dtype, torch.dtype):
        raise PatchError(f"compute_dtype must be a torch.dtype or None, found {compute_dtype!r}")
    with _lock:
        backbones = find(model)
        if not backbones:
            raise PatchError(_not_found(model))
        own: list[nn.Module] = []
        before = [_state(backbone) for _, backbone in backbones if isinstance(backbone, FusedBackbone)]
        kept = [(state, state.verification) for state in before]
        try:
            for name, backbone in backbones:
                if isinstance(backbone, FusedBackbone):
                    _check_same(name, _state(backbone), backend, compute_dtype)
                else:
                    adopt(backbone, _prepare(name, backbone, backend, compute_dtype))
                    own.append(backbone)
            plans = {name: _state(backbone).program_for(backbone).plan for name, backbone in backbones}
            _check_complete(plans, strict)
            for name, backbone in backbones:
                state = _state(backbone)
                new = backbone in own
                if new:
                    state.expected = frozenset(plans[name].reasons())
                with warmup.compiling(backbone, state, image_size) if new else contextlib.nullcontext():
                    if verify and (state.verification is None or new):
                        state.verification = _verified(name, backbone)
        except BaseException:
            for module in own:
                release(module)
            for state, figures in kept:
                state.verification = figures
            raise
        return Handle(model, backbones, own)


def unpatch(model: nn.Module) -> int:
    """Restore every patched backbone in ``model`` (also in a copy that never had a handle); returns how many."""
    with _lock:
        found = [module for module in model.modules() if isinstance(module, FusedBackbone)]
        for module in found:
            release(module)
        return len(found)


def _prepare(name: str, backbone: Backbone, backend: str, compute_dtype: torch.dtype | None) -> PatchState:
    label = name or type(backbone).__name__
    if "forward" in backbone.__dict__:
        raise PatchError(f"{label}: its forward was replaced on the instance, by another patcher; undo that first")
    lead = backbone.patch_embed.proj._parameters.get("weight")
    if lead is None or lead.is_quantized:
        raise PatchError(
            f"{label}: patch_embed.proj ({type(backbone.patch_embed.proj).__name__}) has no plain weight parameter "
            "(quantized or parametrized); patch the float model"
        )
    for what, attribute in (("dtypes", "dtype"), ("devices", "device")):
        found: dict[Any, str] = {}
        for key, parameter in backbone.named_parameters():
            found.setdefault(getattr(parameter, attribute), key)
        if len(found) > 1:
            listed = ", ".join(f"{value} ({key})" for value, key in found.items())
            raise PatchError(f"{label}: parameters of different {what}: {listed}. Make them one with model.to(...)")
    if lead.is_meta:
        raise PatchError(f"{label}: its parameters are on the meta device, without values; load the weights first")
    if not lead.is_floating_point():
        raise PatchError(f"{label}: its parameters are {lead.dtype}; expected {dtypes.ANY}")
    chosen = backends.choose(backend, lead.device, compute_dtype or lead.dtype)
    if chosen.why_not(lead.device, lead.dtype):
        raise BackendError(f"{label}: backend {chosen.name!r} does not read {lead.dtype} parameters: convert the model")
    if compute_dtype is not None and chosen.slow is not None and (reason := chosen.slow(compute_dtype)):
        warnings.warn(
            f"{label}: products in {dtypes.name_of(compute_dtype)} are slow on this machine: {reason}",
            UserWarning,
            stacklevel=3,  # the caller of patch
        )
    return PatchState(backend, chosen.name, compute_dtype, name)


def _check_same(name: str, state: PatchState, backend: str, compute_dtype: torch.dtype | None) -> None:
    if state.compute_dtype != compute_dtype or backend not in (state.backend, state.resolved):
        raise PatchError(
            f"{name or 'the model'} is already patched with backend={state.backend!r}, "
            f"compute_dtype={state.compute_dtype}; asked for backend={backend!r}, compute_dtype={compute_dtype}. "
            "Call riformer_kernels.unpatch(model) first"
        )


def _check_complete(plans: dict[str, BackbonePlan], strict: bool) -> None:
    reasons = {_join(name, part): why for name, plan in plans.items() for part, why in plan.reasons().items()}
    if strict and reasons:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        total = sum(1 for plan in plans.values() for _ in plan.parts())
        raise PatchError(
            f"{len(reasons)} of {total} parts of the backbone cannot be fused, and strict=True asks for all of them:\n"
            f"{listed}\nPass strict=False to patch the rest; the report then lists these"
        )


def _verified(name: str, backbone: Backbone) -> verification.Verification:
    result = verification.verify(backbone)
    if not result.passed:
        raise VerificationError(
            f"{name or type(backbone).__name__}: the fused forward is farther from float64 than the error-ratio rule "
            f"allows, so the model was left as it was:\n" + "\n".join(result.lines(failed_only=True))
        )
    return result


def _not_found(model: nn.Module) -> str:
    near = []
    for name, module in model.named_modules():
        if "patch_embed" in module._modules or "network" in module._modules:
            near.append(f"{name or 'the model'} ({type(module).__name__}) {why_not_backbone(module)}")
    children = ", ".join(f"{name}: {type(module).__name__}" for name, module in list(model.named_children())[:6])
    looked = "; ".join(near) if near else f"its children are {children or 'none'}"
    return (
        f"{type(model).__name__} is not, and does not contain, a RIFormer: {looked}. Expected a module with "
        "patch_embed.proj, a ModuleList 'network' of Sequential stages of RIFormer blocks, and out_indices"
    )
