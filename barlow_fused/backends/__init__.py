"""The backends: who can run the four operations of the loss, and where.

Each backend is a module with the same four functions, and one class that carries data between them:

    normalize(z_a, z_b, normalization)             -> Normalized         each feature's statistics, and c = diag(C)
    gram(x, lambd, scale, need_grad)               -> (terms, product)   Gram route: product holds K_a and K_b
    correlate(x, lambd, scale, need_grad)          -> (terms, product)   direct route: product holds C
    input_grad(x, product, route, weights, needs)  -> (grad_a, grad_b)   None for one that is not needed

``x`` is what ``normalize`` returned, terms are (loss, on_diag, off_diag), and ``product`` is None or unused where
``need_grad`` is False. ``Normalized.saved()`` is the list of tensors from which ``Normalized.from_saved`` makes it
again in the backward pass; ``empty_saved(z_a, route, normalization)`` gives empty tensors of the shapes and dtypes of
[product, *saved] for torch.compile.

``torch_backend.py`` has them in plain sight. Nothing else in the package knows which backend runs. ``"reference"`` is
not among them: it is plain differentiable PyTorch (``reference.py``), and takes no route but its own.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("torch", "triton", "cuda", "reference")


class Weights(NamedTuple):
    """The gradients of whatever comes after with respect to (loss, on_diag, off_diag): scalars, None meaning zero."""

    g_loss: Tensor | None
    g_on: Tensor | None
    g_off: Tensor | None
    lambd: float
    scale: float


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
