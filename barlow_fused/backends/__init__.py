"""The backends: who can run the four operations of the loss, and where.

Each backend is a module with the same four functions (the narrow waist, documented in ``torch_backend.py``):

    normalize(z_a, z_b, normalization)  -> Normalized      statistics of each feature, and c = diag(C)
    gram(x)                             -> (product, off)  K_a, K_b and the off-diagonal sum   (Gram route)
    correlate(x)                        -> (product, off)  C and the off-diagonal sum          (direct route)
    input_grad(x, product, ...)         -> (grad_a, grad_b)

Nothing else in the package knows which one runs. ``"reference"`` is not among them: it is plain differentiable PyTorch
(``reference.py``), and takes no route but its own.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

BACKENDS = ("torch", "triton", "cuda", "reference")


def load(name: str) -> ModuleType:
    """The module that implements the four operations."""
    return importlib.import_module(f".{name}_backend", __package__)


def why_unusable(name: str, device: torch.device) -> str | None:
    """One sentence on why backend ``name`` cannot run on ``device``; None when it can."""
    if name in ("torch", "reference"):
        return None
    # The CUDA and Triton kernels are not part of this version.
    return f"backend={name!r} cannot run on {device}: this version of barlow_fused has no {name} kernels yet"


def fastest(device: torch.device) -> str:
    """The backend that ``"auto"`` takes on ``device``."""
    return next(name for name in ("cuda", "triton", "torch") if why_unusable(name, device) is None)
