"""What the backends of kernels ask of the device that tensors are on."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def why_no_gpu(device: torch.device) -> str | None:
    """Why ``device`` is not a GPU that kernels of this package can run on."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU; tensors are on {device.type}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "it needs a CUDA GPU, and PyTorch sees none here"
    return why_too_old(torch.cuda.get_device_capability(device))


def why_too_old(capability: tuple[int, int]) -> str | None:
    """Why a GPU of that compute capability is not one."""
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return None


def guard(z: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of ``z`` the current one, on which Triton launches."""
    if z.device.type != "cuda" or z.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(z.device)
