"""What depends on the device that tensors are on, and on who made it: what it can do, and how that is asked for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

TYPICAL_UNITS = 132  # where a device does not say
_AS_IT_IS = contextlib.nullcontext()


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


def current_stream(device: torch.device) -> int:
    """The handle of PyTorch's current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def guard(z: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of ``z`` the current one, on which Triton launches."""
    device = z.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(device)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Operations that choose their own precision: autocast must not change it inside them."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@functools.cache
def units(device: torch.device) -> int:
    """How many programs a device runs at once: a GPU's multiprocessors."""
    properties = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    if device.type == "cpu" or properties is None or not getattr(torch, device.type).is_available():
        return TYPICAL_UNITS
    found = properties(device)
    return getattr(found, "multi_processor_count", None) or getattr(found, "gpu_subslice_count", TYPICAL_UNITS)


def widest(x: Tensor) -> torch.dtype:
    """float64, or where the device has none, the dtype of ``x``."""
    return torch.float64 if _has_float64(x.device.type) else x.dtype


def matmul(x: Tensor, y: Tensor) -> Tensor:  # [M, K], [K, L] -> [M, L]
    """x @ y, of half-precision factors with float32 sums and result."""
    if x.dtype.itemsize > 2:
        return x @ y
    if _sums_in_float32(x.device.type):
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()


def bmm(x: Tensor, y: Tensor) -> Tensor:  # [B, M, K], [B, K, L] -> [B, M, L]
    """The same of batches."""
    if x.dtype.itemsize > 2:
        return torch.bmm(x, y)
    if _sums_in_float32(x.device.type):
        return torch.bmm(x, y, out_dtype=torch.float32)
    return torch.bmm(x.float(), y.float())


def tf32() -> bool:
    """Whether PyTorch may multiply float32 as TF32 on GPUs, by whichever of its settings this was said.

    ``torch.get_float32_matmul_precision()`` raises once ``torch.backends.cuda.matmul.fp32_precision`` was set. This one
    also knows what ``torch.set_float32_matmul_precision`` and ``allow_tf32`` have set.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def _has_float64(device_type: str) -> bool:
    return _works(lambda: torch.zeros((), dtype=torch.float64, device=device_type).add_(1))


@functools.cache
def _sums_in_float32(device_type: str) -> bool:
    """Whether the library's products of halves can return float32: not on CPUs, MPS and early ROCm."""

    def multiply() -> None:
        x = torch.zeros(16, 16, dtype=torch.bfloat16, device=device_type)
        torch.mm(x, x, out_dtype=torch.float32)
        torch.bmm(x[None], x[None], out_dtype=torch.float32)

    return _works(multiply)


def _works(attempt: Callable[[], object]) -> bool:
    """Whether a device can do something, found out by doing it: for real, also where a call is only traced or faked."""
    try:
        with _disable_current_modes():
            attempt()
    except (
        RuntimeError,
        TypeError,
        AssertionError,
    ):  # of the operator, of its arguments, of a PyTorch without the device
        return False
    return True
