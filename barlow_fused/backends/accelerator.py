"""Everything that depends on the device that tensors are on, and on who made it.

``of(device)`` describes a device of this machine, ``named(architecture)`` a GPU that need not be here. Nothing else in
the package asks PyTorch what a device is, and nothing else tells makers apart. PyTorch calls AMD's GPUs "cuda", too.

              device type   architectures                  float32 products                 shared memory
    NVIDIA    cuda          sm_80 and newer                as TF32, or as three of these    99 to 227 KiB
    AMD       cuda          gfx90a, gfx942, gfx950         as they are; gfx942 also TF32    64 KiB, gfx950 160 KiB
                            gfx11.., gfx12..               as they are                      64 KiB
    Intel     xpu                                          as TF32, or as three of these    what the device says
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

GPUS = ("cuda", "xpu")  # the device types of GPUs that kernels of this package can be compiled for
TYPICAL_UNITS = 132  # where a device does not say
KIB = 1024
SM_SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227}  # KiB; others: 99
MATRIX_CORES = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx120")  # AMD's architectures for which kernels are compiled
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
AMD_DRIVER = Path("/sys/module/amdgpu/version")
_AS_IT_IS = contextlib.nullcontext()
_THREAD = threading.local()


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A device, and what kernels may use of it.

    Attributes:
        maker: ``"nvidia"``, ``"amd"`` or ``"intel"``; of any other device its type.
        architecture: as compilers call it, ``"sm_90"`` or ``"gfx942"``; ``""`` where there is no such name.
        name: as PyTorch calls it.
        features: what else the compiler is told, ``"sramecc+:xnack-"``.
        units: how many programs run at once: multiprocessors, compute units, Xe cores.
        memory: bytes, where the device says.
        mig: whether it is a part of a GPU.
        warp_size: how many threads share an instruction.
        shared_memory: bytes that a program may use.
        float64: whether it computes in float64.
        precisions: how Triton can multiply float32 there, beside exactly (``"ieee"``).
        tma: whether it has a tensor memory accelerator that Triton uses.
        ticket: what one thread's atomic operation that releases and acquires needs to do so for all of a program.
            ``"wait"``: before it, every thread waits for its stores; a CDNA wavefront releases only its own (as RDNA's
            did, llvm-project 161638). ``"barrier"``: another barrier after it, that RDNA's second first-level cache of
            a workgroup is invalidated as well (triton 11289).
    """

    maker: str
    architecture: str = ""
    name: str = ""
    features: str = ""
    units: int = TYPICAL_UNITS
    memory: int | None = None
    mig: bool = False
    warp_size: int = 32
    shared_memory: int = 64 * KIB
    float64: bool = True
    precisions: tuple[str, ...] = ()
    tma: bool = False
    ticket: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether it is of a maker for whose GPUs there are kernels."""
        return self.maker in ("nvidia", "amd", "intel") and self.architecture != ""

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability of an NVIDIA GPU."""
        version = self.architecture.removeprefix("sm_") if self.maker == "nvidia" else ""
        return (int(version[:-1]), int(version[-1])) if version else None

    def float32_precision(self, tf32: bool) -> str:
        """How Triton multiplies float32: rounded to TF32 where that is allowed, else as exactly as float32."""
        if tf32 and "tf32" in self.precisions:
            return "tf32"
        return "tf32x3" if "tf32x3" in self.precisions else "ieee"


@functools.cache
def of(device: torch.device) -> Accelerator:
    """What ``device`` is, found out once; starts nothing on it but what PyTorch needs to name it."""
    if device.type not in GPUS or not module(device).is_available():
        maker = device.type
        if device.type == "cuda" and (torch.version.cuda or torch.version.hip):
            maker = "amd" if torch.version.hip else "nvidia"
        return Accelerator(maker, name=device.type, float64=_has_float64(device.type))
    found = module(device).get_device_properties(device)
    common = {"name": found.name, "memory": found.total_memory}
    if device.type == "xpu":
        return _intel(found, **common)
    if torch.version.hip:
        architecture, _, features = found.gcnArchName.partition(":")
        return _amd(architecture, features=features, units=found.multi_processor_count, **common)
    mig = "MIG" in found.name or os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG")
    return _nvidia(f"sm_{found.major}{found.minor}", units=found.multi_processor_count, mig=mig, **common)


def named(architecture: str, units: int = TYPICAL_UNITS) -> Accelerator:
    """A GPU of NVIDIA's or AMD's that need not be here.

    Raises:
        ValueError: no such architecture.
    """
    if re.fullmatch(r"sm_\d{2,3}", architecture):
        return _nvidia(architecture, units=units)
    if re.fullmatch(r"gfx\d{1,2}[0-9a-f]{2}", architecture):
        return _amd(architecture, units=units)
    raise ValueError(f"architecture must be like 'sm_90' or 'gfx942', got {architecture!r}")


def _nvidia(architecture: str, **about: Any) -> Accelerator:
    number = int(architecture.removeprefix("sm_"))
    return Accelerator(
        "nvidia",
        architecture,
        shared_memory=SM_SHARED_MEMORY.get(number, 99) * KIB,
        precisions=("tf32", "tf32x3"),
        tma=90 <= number < 120,
        **about,
    )


def _amd(architecture: str, **about: Any) -> Accelerator:
    rdna = architecture.startswith("gfx1")
    return Accelerator(
        "amd",
        architecture,
        warp_size=32 if rdna else 64,
        shared_memory=(160 if architecture == "gfx950" else 64) * KIB,
        precisions=("tf32",) if architecture == "gfx942" else (),
        ticket="barrier" if rdna else "wait",
        **about,
    )


def _intel(found: Any, **about: Any) -> Accelerator:
    return Accelerator(
        "intel",
        f"xe-{getattr(found, 'architecture', None) or getattr(found, 'version', 'unknown')}",
        units=getattr(found, "gpu_subslice_count", None) or TYPICAL_UNITS,
        shared_memory=getattr(found, "local_mem_size", None) or 64 * KIB,
        float64=bool(found.has_fp64),
        precisions=("tf32", "tf32x3"),
        **about,
    )


# Who can run there


def why_no_triton(about: Accelerator) -> str | None:
    """Why Triton's kernels cannot run on such a device."""
    if about.maker not in ("nvidia", "amd", "intel"):
        return f"it needs a GPU of NVIDIA, AMD or Intel; tensors are on {about.name}"
    if not about.is_gpu:
        return "it needs a GPU, and PyTorch sees none here"
    if about.maker == "amd" and not about.architecture.startswith(MATRIX_CORES):
        known = ", ".join(f"{name}.." if name[-1].isdigit() else name for name in MATRIX_CORES)
        return f"of AMD's architectures it needs {known}; this GPU is {about.architecture}"
    if not about.float64:
        return "it adds sums up in float64, which this GPU does not have"
    return _why_too_old(about)


def why_no_cuda(about: Accelerator) -> str | None:
    """Why NVIDIA's kernels, the CUDA extension, cannot run on such a device."""
    if about.maker != "nvidia":
        of_maker = {"amd": "this GPU is AMD's", "intel": "this GPU is Intel's"}
        return f"it needs an NVIDIA GPU; {of_maker.get(about.maker, f'tensors are on {about.name}')}"
    return _why_too_old(about) if about.is_gpu else "it needs an NVIDIA GPU, and PyTorch sees none here"


def _why_too_old(about: Accelerator) -> str | None:
    if about.capability is not None and about.capability < (8, 0):
        major, minor = about.capability
        return f"it needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None


# What is asked of PyTorch


def module(device: torch.device) -> ModuleType:
    """PyTorch's module for devices of that type: ``torch.cuda``, also for AMD's, or ``torch.xpu``."""
    return getattr(torch, device.type)


def here() -> list[torch.device]:
    """The GPUs of this machine."""
    return [torch.device(kind, index) for kind in GPUS for index in range(count(kind))]


def count(kind: str) -> int:
    """How many devices of a type there are."""
    found = getattr(torch, kind, None)
    return found.device_count() if hasattr(found, "device_count") and found.is_available() else 0


def current_gpu() -> torch.device:
    """The GPU on which PyTorch allocates where only the type is said."""
    kind = next((kind for kind in GPUS if count(kind)), "cuda")
    return torch.device(kind, getattr(torch, kind).current_device())


def current_stream(device: torch.device) -> int:
    """The handle of PyTorch's current stream, where a launch takes one."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def guard(z: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of ``z`` the current one, on which Triton launches."""
    device = z.device
    if device.type not in GPUS:
        return _AS_IT_IS
    of_type = module(device)
    return _AS_IT_IS if device.index == of_type.current_device() else of_type.device(device)


def bind(device: torch.device) -> None:
    """Make the device's context this thread's, once: where a thread begins with a tensor descriptor, nothing else has.

    The runtime does it at its first call that is about a stream; this one may also be made while a graph is captured.
    """
    bound = _THREAD.__dict__.setdefault("bound", set())
    if device.type == "cuda" and device not in bound:
        torch.cuda.is_current_stream_capturing()
        bound.add(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        found = module(device)
        found.synchronize(device) if device.type in GPUS else found.synchronize()


def free_memory(device: torch.device) -> int | None:
    """Bytes, where the device says."""
    ask = getattr(module(device), "mem_get_info", None)
    return ask(device)[0] if ask else None


def empty_cache(device: torch.device) -> None:
    """Give back what PyTorch's allocator keeps."""
    if device.type != "cpu":
        module(device).empty_cache()


def can_capture(device: torch.device) -> bool:
    """Whether a call can be captured in a graph."""
    return device.type in GPUS and _graph_class(device) is not None


@contextlib.contextmanager
def capture(device: torch.device) -> Iterator[Any]:
    """What is launched in this block is captured, in the graph that it yields, instead of run."""
    graph = _graph_class(device)()
    with module(device).graph(graph):
        yield graph


def _graph_class(device: torch.device) -> type | None:
    return getattr(module(device), {"cuda": "CUDAGraph", "xpu": "XPUGraph"}[device.type], None)


def runtime() -> str | None:
    """The version of the runtime that this PyTorch is built for."""
    versions = (("HIP", torch.version.hip), ("XPU", getattr(torch.version, "xpu", None)), ("CUDA", torch.version.cuda))
    return next((f"{name} {version}" for name, version in versions if version), None)


def driver(device: torch.device) -> str | None:
    """The driver's version, as far as it says so without being started."""
    if device.type == "xpu":
        return getattr(module(device).get_device_properties(device), "driver_version", None)
    try:
        return (AMD_DRIVER if torch.version.hip else NVIDIA_DRIVER).read_text().splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return None


def seeing_only(device: torch.device, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable, and its value, that leaves a process in ``environment`` this GPU alone, as the first."""
    names = {"cuda": ("CUDA_VISIBLE_DEVICES",), "xpu": ("ZE_AFFINITY_MASK",)}.get(device.type, ())
    if torch.version.hip and names:
        names = ("HIP_VISIBLE_DEVICES", *names)  # the first of them that is set is obeyed
    if not names:
        return {}
    name = next((name for name in names if environment.get(name)), names[0])
    visible = [entry.strip() for entry in environment.get(name, "").split(",") if entry.strip()]
    index = device.index or 0
    return {name: visible[index] if index < len(visible) else str(index)}


def units(device: torch.device) -> int:
    """How many programs a device runs at once."""
    return of(device).units


# Numbers


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Operations that choose their own precision: autocast must not change it inside them."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _AS_IT_IS


_AS_IT_IS = contextlib.nullcontext()


def widest(x: Tensor) -> torch.dtype:
    """float64, or where the device has none, the dtype of ``x``."""
    return torch.float64 if of(x.device).float64 else x.dtype


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
