"""Fused inference kernels for RIFormer (CVPR 2023).

    import riformer_kernels
    handle = riformer_kernels.patch(model)
    print(handle)

Importing registers the ops of the ``riformer`` namespace and does nothing else.
"""

from . import functional
from .engine import Engine
from .errors import BackendError, InputError, MemoryLimitError, PatchError, RIFormerKernelsError, VerificationError
from .functional import norm_mlp
from .patching import Handle, Row, patch, unpatch
from .verification import Comparison, Verification

__version__ = "0.3.1"

__all__ = [
    "BackendError", "Comparison", "Engine", "Handle", "InputError", "MemoryLimitError", "PatchError",
    "RIFormerKernelsError", "Row", "Verification", "VerificationError", "functional", "norm_mlp", "patch", "unpatch",
]  # fmt: skip
