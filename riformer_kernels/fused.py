"""The class of a patched backbone: its forward runs the fused ops, everything else stays the original's.

``adopt`` sets a backbone's ``__class__`` to a subclass of its own class with ``FusedBackbone`` in front. That survives
deepcopy, pickle, DataParallel replicas and ``isinstance``; a closure or a bound method in ``module.forward`` does not.
The only thing added to the instance is one ``PatchState`` in its ``__dict__``, which is no part of the state dict.

A call goes from ``FusedBackbone.forward`` to ``forward.run``, which makes a ``ForwardPass`` of the module's program and
a backend; each part of the network then is one call of an op, ``backend.ops[name]``.
"""

from __future__ import annotations

import copyreg
import threading
import types
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from . import backends
from .errors import BackendError
from .forward import run
from .modules import STATE, Backbone
from .patch_state import PatchState, traced_plan, traced_warning
from .program import Program, TracedProgram

# At run time the class that a mixin stands in front of is the one that brings nn.Module.
if TYPE_CHECKING:
    _Base = Backbone
else:
    _Base = object


class FusedBackbone(_Base):
    """Mixin in front of a backbone's own class, see ``adopt``. Everything but ``forward`` stays the original's."""

    _original_class: ClassVar[type[nn.Module]]

    def forward(self, x: torch.Tensor) -> Any:
        """What the original forward returns. See ``riformer_kernels.patch`` for what is promised.

        Raises:
            InputError: not a batch of images of the right rank, channels, dtype, device and size.
            BackendError: the module was moved to a device or dtype that the backend does not serve.
        """
        state: PatchState = self.__dict__[STATE]
        program: Program | TracedProgram
        if torch.compiler.is_compiling():
            program = TracedProgram(self, traced_plan(state.number))
        else:
            program = state.program_for(self)
            if not state.expected.issuperset(program.reasons):
                state.report_losses(program)
        if torch.is_grad_enabled() and ((isinstance(x, torch.Tensor) and x.requires_grad) or program.requires_grad()):
            return self._differentiable(state, x)
        return run(self, program, state, x)

    def _differentiable(self, state: PatchState, x: torch.Tensor) -> Any:
        """The original forward, differentiable; says once which path this is and how to leave it."""
        if torch.compiler.is_compiling():
            traced_warning(state.number)
        else:
            state.warn_gradients()
        return self._original_class.forward(self, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class exists in this process only, so a copy or pickle names the original class and is rebuilt.
        reduced: Any = super().__reduce_ex__(protocol)
        state: PatchState = self.__dict__[STATE]
        function, arguments, *rest = reduced
        ordinary = (copyreg.__newobj__, copyreg._reconstructor)  # type: ignore[attr-defined]  # what object reduces to
        if function in ordinary and arguments[0] is type(self):
            return (_rebuild, (self._original_class, state.resolved), *rest)
        return reduced

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__[STATE] = self.__dict__[STATE].copy_for(self)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__[STATE] = replica.__dict__[STATE].copy_for(replica)
        return replica


def _rebuild(original: type[nn.Module], backend: str) -> nn.Module:
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


_classes: weakref.WeakKeyDictionary[type[nn.Module], weakref.ref[type[FusedBackbone]]] = weakref.WeakKeyDictionary()
_classes_lock = threading.Lock()


def fused_class(original: type[nn.Module]) -> type[FusedBackbone]:
    """The subclass of ``original`` that carries the fused forward; one per class."""
    with _classes_lock:
        reference = _classes.get(original)
        cls = reference() if reference is not None else None
        if cls is None:
            body = {"__module__": original.__module__, "__doc__": original.__doc__, "_original_class": original}
            made = types.new_class(
                f"Fused{original.__name__}", (FusedBackbone, original), {}, lambda namespace: namespace.update(body)
            )
            cls = cast("type[FusedBackbone]", made)
            # A weak value: the subclass refers to its base, so a strong one would keep both alive for ever.
            _classes[original] = weakref.ref(cls)
        return cls


def adopt(module: nn.Module, state: PatchState) -> None:
    """Make ``module`` run the fused forward, in place."""
    cls = fused_class(type(module))
    state.belong_to(cast("Backbone", module))
    module.__dict__[STATE] = state
    module.__class__ = cls


def release(module: nn.Module) -> None:
    """Undo ``adopt``; nothing happens to a module that is not patched."""
    if isinstance(module, FusedBackbone):
        patched: Any = module
        patched.__class__ = module._original_class
        patched.__dict__.pop(STATE, None)
