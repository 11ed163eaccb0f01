"""The errors of the engine. All of them name what was found, what was expected and the way out."""

from __future__ import annotations


class RIFormerKernelsError(Exception):
    """Base class of every error that this package raises on purpose."""


class PatchError(RIFormerKernelsError, ValueError):
    """``patch`` could not replace what it was asked to replace; the model is left exactly as it was."""


class VerificationError(PatchError):
    """The patched model's numbers are farther from the fp64 golden than the error-ratio rule allows."""


class BackendError(RIFormerKernelsError, RuntimeError):
    """No backend serves this device, dtype or machine, or the named backend is not usable here."""


class InputError(RIFormerKernelsError, ValueError):
    """An image or tensor has the wrong rank, number of channels, dtype or device."""


class MemoryLimitError(RIFormerKernelsError, RuntimeError):
    """Out of memory; the message says on which device, for what, and how much was asked for."""
