"""What a patched module carries: the decisions of ``patch``, and what its forward remembers between calls."""

from __future__ import annotations

import itertools
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch

from . import backends, probe
from .errors import PatchError
from .modules import Backbone
from .plan import BackbonePlan
from .program import Program
from .recognise import describe
from .tracing import constant_while_tracing

if TYPE_CHECKING:
    from .verification import Verification

_DECISIONS = ("backend", "resolved", "compute_dtype", "name", "verification", "expected", "refused")
_numbers = itertools.count(1)
_states: weakref.WeakValueDictionary[int, PatchState] = weakref.WeakValueDictionary()


class PatchState:
    """The decisions for one module, and the caches of its forward.

    Only the decisions are copied or pickled; a copy makes its own ``Program`` from its own modules.

    Attributes:
        backend: the backend's name as ``patch`` was asked for, perhaps "auto".
        resolved: name of the backend that was chosen.
        compute_dtype: dtype of the tokens, None for that of the parameters.
        name: the module's name in the model that was patched.
        verification: the figures of ``patch``'s verification, None when it was not run.
        expected: names of the parts that could not be fused when the module was patched.
        refused: the answer of the probes, see ``probe.refusals``.
        number: a key for this state while tracing, when a state itself cannot be an argument.
    """

    def __init__(self, backend: str, resolved: str, compute_dtype: torch.dtype | None, name: str) -> None:
        self.backend = backend
        self.resolved = resolved
        self.compute_dtype = compute_dtype
        self.name = name
        self.verification: Verification | None = None
        self.expected: frozenset[str] = frozenset()
        self.refused: dict[str, str] = {}
        self._forget()

    def _forget(self) -> None:
        """Start with empty caches, and belong to no module yet."""
        self._program: Program | None = None
        self._owner: weakref.ref[Backbone] | None = None
        self._warned: set[str] = set()
        self._backends: dict[tuple[str, torch.dtype], backends.Backend] = {}
        self.number = next(_numbers)
        _states[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in _DECISIONS}

    def __setstate__(self, decisions: dict[str, Any]) -> None:
        self.__dict__.update(decisions)
        self._forget()

    def copy_for(self, owner: Backbone) -> PatchState:
        """The same decisions for another module, with empty caches."""
        state = object.__new__(PatchState)
        state.__setstate__(self.__getstate__())
        state.belong_to(owner)
        return state

    def belong_to(self, owner: Backbone) -> None:
        """Set the module whose forward is traced with this state."""
        self._owner = weakref.ref(owner)

    def owner(self) -> Backbone:
        """The module that this state belongs to.

        Raises:
            PatchError: there is none. Modules that share one instance dictionary can bring this about.
        """
        owner = None if self._owner is None else self._owner()
        if owner is None:
            raise PatchError(
                f"the module that {self.label} was patched on is gone, and another one uses its state. Copy patched "
                "modules with copy.deepcopy, and patch those that were put together by hand on their own"
            )
        return owner

    @property
    def multiple(self) -> int:
        """What the backend needs the numbers of channels to be multiples of."""
        return backends.ALL[self.resolved].multiple

    def program_for(self, module: Backbone) -> Program:
        """The program for ``module`` as it is now; made anew when hooks, flags or submodules have changed."""
        program = self._program
        if program is None or not program.snapshot.holds(module):
            plan = describe(module, self.multiple)
            # DataParallel replicas have tensors for parameters; the module that they were made from was probed.
            if not module.__dict__.get("_is_replica"):
                self.refused = probe.refusals(module, plan)
            plan = plan.refuse(self.refused)
            program = Program(module, plan)
            # One assignment: another thread sees the old program or the new one, both complete.
            self._program = program
        return program

    def backend_for(self, device: torch.device, dtype: torch.dtype) -> backends.Backend:
        """The backend for tokens of this dtype: by device and dtype, as ``.to()`` may have moved the module."""
        if torch.compiler.is_compiling():
            return backends.ALL[_traced_backend(self.number, dtype)]
        key = (device.type, dtype)
        if key not in self._backends:
            self._backends[key] = backends.choose(self.backend, device, dtype)
        return self._backends[key]

    def warn_once(self, keys: list[str], message: str) -> None:
        """Warn unless everything in ``keys`` was warned about before."""
        if not self._warned.issuperset(keys):
            self._warned.update(keys)
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
        new = [f"{name}: {reason}" for name, reason in lost.items() if f"{name}: {reason}" not in self._warned]
        listed = "; ".join(new[:3]) + (f"; and {len(new) - 3} more, see the handle's report" if len(new) > 3 else "")
        self.warn_once(new, f"{self.label}: no longer fused, runs its own modules: {listed}")

    @property
    def label(self) -> str:
        return f"patched RIFormer {self.name!r}" if self.name else "patched RIFormer"


# While tracing, these are called by Python with constants for arguments, and their results are constants in the graph.


@constant_while_tracing
def traced_plan(number: int) -> BackbonePlan:
    """The plan of the module whose state has this number."""
    state = _states[number]
    program = state.program_for(state.owner())
    state.report_losses(program)
    return program.plan


@constant_while_tracing
def traced_warning(number: int) -> bool:
    """Warn that gradients are due, at trace time; nothing is left in the graph."""
    _states[number].warn_gradients()
    return True


@constant_while_tracing
def _traced_backend(number: int, dtype: torch.dtype) -> str:
    state = _states[number]
    return backends.choose(state.backend, state.owner().patch_embed.proj.weight.device, dtype).name
