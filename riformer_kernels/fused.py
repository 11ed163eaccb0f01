"""The fused forward, and the class that carries it.

``adopt`` sets a backbone's ``__class__`` to a subclass of its own class with ``FusedBackbone`` in front. That survives
deepcopy, pickle, DataParallel replicas and ``isinstance``; a closure or a bound method in ``module.forward`` does not.
The only thing added to the instance is one ``Config`` in its ``__dict__``, which is no part of the state dict.
"""

from __future__ import annotations

import copyreg
import itertools
import threading
import types
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from . import backends, probe
from .errors import BackendError
from .forward import run
from .program import Program, TracedProgram
from .recognise import BackbonePlan, describe

CONFIG = "_riformer_kernels"
NATIVE_MULTIPLE = 8
_tokens = itertools.count(1)
_configs: weakref.WeakValueDictionary[int, Config] = weakref.WeakValueDictionary()


class Config:
    """What patching decided for one module, and what its forward remembers between calls.

    Only the decisions are copied or pickled; a copy builds its own ``Program`` from its own modules.
    """

    def __init__(self, backend: str, resolved: str, compute_dtype: torch.dtype | None, name: str) -> None:
        self.backend = backend
        self.resolved = resolved
        self.compute_dtype = compute_dtype
        self.name = name
        self.verification: Any = None
        self.expected: frozenset[str] = frozenset()
        self.refused: dict[str, str] = {}
        self._forget()

    def _forget(self) -> None:
        self.program: Program | None = None
        self.owner: weakref.ref[nn.Module] | None = None
        self.warned: set[str] = set()
        self.served: dict[tuple[str, torch.dtype], backends.Backend] = {}
        self.token = next(_tokens)
        _configs[self.token] = self

    def __getstate__(self) -> dict[str, Any]:
        kept = ("backend", "resolved", "compute_dtype", "name", "verification", "expected", "refused")
        return {key: self.__dict__[key] for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def fresh(self, owner: nn.Module) -> Config:
        """The same decisions without anything remembered, for another module."""
        config = object.__new__(Config)
        config.__setstate__(self.__getstate__())
        config.owner = weakref.ref(owner)
        return config

    @property
    def multiple(self) -> int:
        return 1 if self.resolved == "reference" else NATIVE_MULTIPLE

    def current(self, module: nn.Module) -> Program:
        """The program for ``module`` as it is now; derived again when hooks, flags or submodules have changed."""
        program = self.program
        if program is None or not program.guard.holds(module):
            plan = describe(module, self.multiple)
            # DataParallel replicas have tensors for parameters; the module that they were made from was probed.
            if not module.__dict__.get("_is_replica"):
                self.refused = probe.refusals(module, plan)
            plan = plan.refuse(self.refused)
            program = Program(module, plan)
            # One assignment: another thread sees the old program or the new one, both complete.
            self.program = program
        return program

    def serving(self, device: torch.device, dtype: torch.dtype) -> backends.Backend:
        """The backend for tokens of this dtype: by device and dtype, as ``.to()`` may have moved the module."""
        if torch.compiler.is_compiling():
            return backends.ALL[_traced_backend(self.token, dtype)]
        key = (device.type, dtype)
        if key not in self.served:
            self.served[key] = backends.choose(self.backend, device, dtype)
        return self.served[key]

    def warn_once(self, keys: list[str], message: str) -> None:
        """Warn unless everything in ``keys`` was warned about before."""
        if not self.warned.issuperset(keys):
            self.warned.update(keys)
            warnings.warn(message, UserWarning, stacklevel=7)  # the caller of the model

    def warn_gradients(self) -> None:
        self.warn_once(
            ["gradients"],
            f"{self.label} was called where gradients are due: its original forward runs, not the fused kernels. "
            "For inference call it under torch.inference_mode() or torch.no_grad()",
        )

    def report_losses(self, program: Program) -> None:
        """Warn, once for each part and reason, that what was fused when the module was patched no longer is."""
        lost = {name: reason for name, reason in program.reasons.items() if name not in self.expected}
        new = [f"{name}: {reason}" for name, reason in lost.items() if f"{name}: {reason}" not in self.warned]
        listed = "; ".join(new[:3]) + (f"; and {len(new) - 3} more, see the handle's report" if len(new) > 3 else "")
        self.warn_once(new, f"{self.label}: no longer fused, runs its own modules: {listed}")

    @property
    def label(self) -> str:
        return f"patched RIFormer {self.name!r}" if self.name else "patched RIFormer"


@torch.compiler.assume_constant_result
def _traced_plan(token: int) -> BackbonePlan:
    """The plan while tracing: derived by Python at trace time and a constant in the graph."""
    config = _configs[token]
    program = config.current(config.owner())
    config.report_losses(program)
    return program.plan


@torch.compiler.assume_constant_result
def _traced_backend(token: int, dtype: torch.dtype) -> str:
    config = _configs[token]
    return backends.choose(config.backend, config.owner().patch_embed.proj.weight.device, dtype).name


@torch.compiler.assume_constant_result
def _traced_warning(token: int) -> bool:
    """The same while tracing: Python warns at trace time, nothing is left in the graph."""
    _configs[token].warn_gradients()
    return True


class FusedBackbone:
    """Mixin in front of a backbone's own class, see ``adopt``. Everything but ``forward`` stays the original's."""

    def forward(self, x: torch.Tensor) -> Any:
        """What the original forward returns. See ``riformer_kernels.patch`` for what is promised.

        Raises:
            InputError: not a batch of images of the right rank, channels, dtype, device and size.
            BackendError: the module was moved to a device or dtype that the backend does not serve.
        """
        config = self.__dict__[CONFIG]
        if torch.compiler.is_compiling():
            program = TracedProgram(self, _traced_plan(config.token))
        else:
            program = config.current(self)
            if not config.expected.issuperset(program.reasons):
                config.report_losses(program)
        if torch.is_grad_enabled() and ((isinstance(x, torch.Tensor) and x.requires_grad) or program.requires_grad()):
            return self._differentiable(config, x)
        return run(self, program, config, x, tracing=torch.compiler.is_compiling())

    def _differentiable(self, config: Config, x: torch.Tensor) -> Any:
        """The original forward, differentiable; says once which path this is and how to leave it."""
        if torch.compiler.is_compiling():
            _traced_warning(config.token)
        else:
            config.warn_gradients()
        return self._original_class.forward(self, x)

    def __reduce_ex__(self, protocol: int) -> Any:
        # The class exists in this process only, so a copy or pickle names the original class and is rebuilt.
        reduced = super().__reduce_ex__(protocol)
        config = self.__dict__[CONFIG]
        function, arguments, *rest = reduced
        if function in (copyreg.__newobj__, copyreg._reconstructor) and arguments[0] is type(self):
            return (_rebuild, (self._original_class, config.resolved), *rest)
        return reduced

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__[CONFIG] = self.__dict__[CONFIG].fresh(self)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__[CONFIG] = replica.__dict__[CONFIG].fresh(replica)
        return replica


def _rebuild(original: type, backend: str) -> nn.Module:
    """Make an empty fused instance, for copy and pickle.

    Raises:
        BackendError: the backend that the module was patched with cannot be used in this process.
    """
    reason = backends.ALL[backend].unusable() if backend in backends.ALL else "unknown to this version"
    if reason:
        raise BackendError(
            f"this {original.__name__} was saved while patched with backend {backend!r}, which cannot be used here: "
            f"{reason}. Save it after riformer_kernels.unpatch(model), or save its state_dict"
        )
    cls = fused_class(original)
    return cls.__new__(cls)


_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()
_classes_lock = threading.Lock()


def fused_class(original: type) -> type:
    """The subclass of ``original`` that carries the fused forward; one per class."""
    with _classes_lock:
        reference = _classes.get(original)
        cls = reference() if reference is not None else None
        if cls is None:
            body = {"__module__": original.__module__, "__doc__": original.__doc__, "_original_class": original}
            cls = types.new_class(
                f"Fused{original.__name__}", (FusedBackbone, original), {}, lambda ns: ns.update(body)
            )
            # A weak value: the subclass refers to its base, so a strong one would keep both alive for ever.
            _classes[original] = weakref.ref(cls)
        return cls


def adopt(module: nn.Module, config: Config) -> None:
    """Make ``module`` run the fused forward, in place."""
    cls = fused_class(type(module))
    config.owner = weakref.ref(module)
    module.__dict__[CONFIG] = config
    module.__class__ = cls


def release(module: nn.Module) -> None:
    """Undo ``adopt``; nothing happens to a module that is not patched."""
    if isinstance(module, FusedBackbone):
        module.__class__ = module._original_class
        module.__dict__.pop(CONFIG, None)
