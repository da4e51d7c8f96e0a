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

A backend that also works over several processes has a second file, ``<name>_partial.py``, with what can be computed of
one rank's part of a batch (``torch_partial.py`` says what that is).

``torch_backend.py`` has the four in plain sight. Nothing else in the package knows which backend runs. ``"reference"``
is not among them: it is plain differentiable PyTorch (``reference.py``), and takes no route but its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
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


@functools.cache
def load(name: str) -> ModuleType:
    """The module that implements the four operations."""
    return importlib.import_module(f".{name}_backend", __package__)


@functools.cache
def load_partial(name: str) -> ModuleType:
    """The module that implements the operations on one rank's part of a batch."""
    return importlib.import_module(f".{name}_partial", __package__)


def why_unusable(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,  # of a GPU that need not be here; None: ask this machine
) -> str | None:
    """One sentence on why backend ``name`` cannot run on ``device``, with inputs of ``dtype``; None when it can."""
    if name in ("torch", "reference"):
        return None
    if dtype == torch.float64:
        return f"backend={name!r} cannot take torch.float64: it takes float32, bfloat16 and float16"
    if capability is not None:
        reason = _why_too_old(capability)
    else:
        reason = _why_no_triton(device) if name == "triton" else load("cuda").why_not_here(device)
    return reason and f"backend={name!r} cannot run on {device}: {reason}"


@functools.cache
def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return None  # Triton's interpreter runs anywhere, slowly
    return why_no_gpu(device)


def why_no_gpu(device: torch.device) -> str | None:
    """Why ``device`` is not a GPU that kernels of this package can run on."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU; tensors are on {device.type}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "it needs a CUDA GPU, and PyTorch sees none here"
    return _why_too_old(torch.cuda.get_device_capability(device))


def _why_too_old(capability: tuple[int, int]) -> str | None:
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return None


class Measured(NamedTuple):
    """A row of ``FASTEST``: with at least ``n`` samples and ``d`` features, these backends, the fastest first."""

    n: int
    d: int
    backends: tuple[str, ...]


# What "auto" takes on a GPU, by compute capability and dtype: the last of the rows that the input reaches, and of its
# backends the first that can run there; PyTorch's where there is none. A row comes from a file of benchmarks/results,
# which it names. Nothing has been measured on a GPU yet.
FASTEST: dict[tuple[tuple[int, int], torch.dtype], tuple[Measured, ...]] = {}


def fastest(
    device: torch.device,
    dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,
    shape: tuple[int, int] | None = None,  # (N, D)
) -> str:
    """The backend that ``"auto"`` takes on ``device``, with inputs of ``dtype`` and ``shape``."""
    if device.type != "cuda" or not FASTEST or shape is None:
        return "torch"
    rows = FASTEST.get((capability or torch.cuda.get_device_capability(device), dtype), ())
    reached = [row.backends for row in rows if shape[0] >= row.n and shape[1] >= row.d]
    usable = (name for name in (reached[-1] if reached else ()) if not why_unusable(name, device, dtype, capability))
    return next(usable, "torch")


def resolve(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,
    shape: tuple[int, int] | None = None,
) -> str:
    """The backend meant by ``name``, which may be ``"auto"``, for inputs of ``dtype`` and ``shape`` on ``device``.

    ``capability`` is that of a GPU that need not be on this machine.

    Raises:
        RuntimeError: it cannot run there.
    """
    if name == "auto":
        return fastest(device, dtype, capability, shape)
    reason = why_unusable(name, device, dtype, capability)
    if reason is not None:
        raise RuntimeError(reason)
    return name
