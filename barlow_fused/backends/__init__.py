"""The backends: who can run the four operations of the loss, and where.

Each backend is a module with what operations.py asks for: the two passes of a call, or the operations that these are
made of.

A backend that also works over several processes has a second file, ``<name>_partial.py``, with what can be computed of
one rank's part of a batch (``torch_partial.py`` says what that is).

``"torch"`` is two such modules, by the device: ``torch_cpu.py`` keeps what is small and cuts the rest for a CPU's
caches, ``torch_whole.py`` keeps everything whole for accelerators. Nothing else in the package knows which backend
runs. ``"reference"`` is not among them: it is plain differentiable PyTorch (``reference.py``), and takes no route but
its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from . import accelerator

BACKENDS = ("torch", "triton", "cuda", "reference")


def load(name: str, device: torch.device) -> ModuleType:
    """The module of a backend, for tensors on ``device``."""
    if name == "torch":
        return _module("torch_cpu" if device.type == "cpu" else "torch_whole")
    return _module(f"{name}_backend")


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def load_partial(name: str) -> ModuleType:
    """The module that implements the operations on one rank's part of a batch."""
    return _module(f"{name}_partial")


def why_unusable(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,  # of a GPU that need not be here (accelerator.named); None: ask this one
) -> str | None:
    """One sentence on why backend ``name`` cannot run on ``device``, with inputs of ``dtype``; None when it can."""
    if name in ("torch", "reference"):
        return None
    if dtype == torch.float64:
        return f"backend={name!r} cannot take torch.float64: it takes float32, bfloat16 and float16"
    if architecture is not None:
        why_not = accelerator.why_no_triton if name == "triton" else accelerator.why_no_cuda
        reason = why_not(accelerator.named(architecture))
    else:
        reason = _why_no_triton(device) if name == "triton" else load("cuda", device).why_not_here(device)
    return reason and f"backend={name!r} cannot run on {device}: {reason}"


@functools.cache
def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None if interpreted() else accelerator.why_no_triton(accelerator.of(device))


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter: anywhere, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
