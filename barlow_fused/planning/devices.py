"""How fast a device is: its memory bandwidth and its matrix-product rate, from a table or measured here.

``plan`` divides FLOPs and bytes by these two rates. GPUs that people train on stand in ``KNOWN``, so that a plan can be
made for hardware that is not here; CPUs and other GPUs are measured, once per process, in well under a second.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..backends import accelerator, slabs
from ..backends.accelerator import Accelerator, tf32

SECONDS_PER_MEASUREMENT = 0.1
COPY_BYTES = 2**27  # larger than the caches
HALVES = (torch.bfloat16, torch.float16)
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192, "xpu": 8192}  # rows and columns of the matrices that are multiplied


@dataclasses.dataclass(frozen=True)
class KnownGpu:
    """A row of the table of rates."""

    torch_name: str  # what torch.cuda.get_device_name() calls it
    architecture: str  # as accelerator.named takes it
    units: int  # multiprocessors, or AMD's compute units
    measured: bool  # bandwidth and "half" are measured; everything else is the datasheet's peak, without sparsity
    bandwidth: float  # bytes/s
    products: dict[str, float]  # FLOP/s of a matrix product, by what its operands are


# Measured: a large copy, and an 8192^3 product in bfloat16, by PyTorch on one GPU. Datasheets: NVIDIA's, of the SXM
# modules; for H200 they say 4.8 TB/s and 989 TFLOP/s, for H100 3.35 TB/s and 989 TFLOP/s. AMD's: the MI355X
# has no TF32.
_HOPPER = {"tf32": 494.7e12, "float32": 66.9e12, "float64": 66.9e12}
_A100 = {"half": 312e12, "tf32": 156e12, "float32": 19.5e12, "float64": 19.5e12}
_B200 = {"half": 2250e12, "tf32": 1100e12, "float32": 75e12, "float64": 37e12}
_MI300X = {"half": 1307.4e12, "tf32": 653.7e12, "float32": 163.4e12, "float64": 163.4e12}
_MI355X = {"half": 2516.6e12, "tf32": 157.3e12, "float32": 157.3e12, "float64": 78.6e12}
KNOWN = {
    "h200": KnownGpu("NVIDIA H200", "sm_90", 132, True, 4.3e12, {"half": 790e12, **_HOPPER}),
    "h100": KnownGpu("NVIDIA H100 80GB HBM3", "sm_90", 132, True, 3.0e12, {"half": 798e12, **_HOPPER}),
    "a100": KnownGpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, False, 2.039e12, _A100),
    "b200": KnownGpu("NVIDIA B200", "sm_100", 148, False, 8.0e12, _B200),
    "mi300x": KnownGpu("AMD Instinct MI300X", "gfx942", 304, False, 5.3e12, _MI300X),
    "mi355x": KnownGpu("AMD Instinct MI355X", "gfx950", 256, False, 8.0e12, _MI355X),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        label: its name for the reader.
        type: ``"cpu"``, ``"cuda"`` (AMD's, too) or ``"xpu"``.
        known: its row of the table, or None: its rates are measured.
        index: which GPU of this machine to measure.
        here: whether it is a device of this machine; one that was named by its row of the table need not be.
    """

    label: str
    type: str
    known: KnownGpu | None = None
    index: int = 0
    here: bool = True

    @property
    def torch_device(self) -> torch.device:
        """As PyTorch names it."""
        return _torch_device(self.type, self.index) if self.here else torch.device(self.type)

    @property
    def about(self) -> Accelerator:
        """What kernels have to know of it."""
        if self.known:
            return accelerator.named(self.known.architecture, self.known.units)
        return accelerator.of(self.torch_device)

    def source(self, dtype: torch.dtype) -> str:
        """Where its bandwidth and its rate for a product in ``dtype`` come from."""
        if self.known is None:
            return "measured now"
        if not self.known.measured:
            return "datasheet peaks"
        return "measured" if dtype in HALVES else "bandwidth measured, product: datasheet peak"

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes."""
        return self.known.bandwidth if self.known else _measure_bandwidth(self.type, self.index)

    def product_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a matrix product of two ``dtype`` matrices. float32 obeys PyTorch's switch (accelerator.tf32)."""
        if self.known is None:
            return _measure_product(self.type, self.index, dtype, torch.get_num_threads(), tf32())
        if dtype in HALVES:
            return self.known.products["half"]
        if dtype == torch.float32 and tf32():
            return self.known.products["tf32"]
        return self.known.products[str(dtype).removeprefix("torch.")]


def resolve_device(device: str | torch.device | None) -> Device:
    """The device meant by a user's ``device`` argument.

    Args:
        device: None (the GPU if there is one, else the CPU), a ``torch.device`` or its name (``"cpu"``, ``"cuda:0"``),
            or the name of a GPU in ``KNOWN``, which need not be here.

    Raises:
        TypeError, ValueError: none of these, or a GPU that this machine does not have.
    """
    accepted = f"'cpu', 'cuda', 'cuda:<index>', 'xpu', or one of {', '.join(map(repr, KNOWN))}"
    if device is None:
        device = next((kind for kind in accelerator.GPUS if accelerator.count(kind)), "cpu")
    if isinstance(device, str):
        if device.lower() in KNOWN:
            known = KNOWN[device.lower()]
            return Device(known.torch_name, "cuda", known, here=False)
        try:
            device = torch.device(device)
        except RuntimeError:
            raise ValueError(f"device must be {accepted}, got {device!r}") from None
    if not isinstance(device, torch.device):
        raise TypeError(f"device must be None, a str or a torch.device, got {type(device).__name__}")
    if device.type not in ("cpu", *accelerator.GPUS):
        raise ValueError(f"device must be {accepted}, got {str(device)!r}")
    if device.type == "cpu":
        return Device(f"{cpu_model()} ({torch.get_num_threads()} threads)", "cpu")
    index, count = device.index, accelerator.count(device.type)
    if index is None:
        index = accelerator.module(device).current_device() if count else 0
    if index >= count:
        raise ValueError(
            f"device={str(device)!r} is not on this machine, which has {count} {device.type.upper()} GPUs; "
            f"to plan for one that is elsewhere, name it: {', '.join(map(repr, KNOWN))}"
        )
    name = accelerator.of(torch.device(device.type, index)).name
    return Device(name, device.type, next((gpu for gpu in KNOWN.values() if gpu.torch_name == name), None), index)


def cpu_model() -> str:
    """The CPU's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _measure_bandwidth(device_type: str, index: int) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=_torch_device(device_type, index))
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _seconds(lambda: target.copy_(source), source.device)


@functools.cache
def _measure_product(device_type: str, index: int, dtype: torch.dtype, threads: int, tf32: bool) -> float:
    """``threads`` and ``tf32`` only tell one cached measurement from another."""
    size = PRODUCT_SIZE[device_type]
    x = torch.linspace(-1, 1, size * size, device=_torch_device(device_type, index)).view(size, size).to(dtype)
    return 2 * size**3 / _seconds(lambda: slabs._matmul_t(x, x, dtype), x.device)


def _torch_device(device_type: str, index: int) -> torch.device:
    return torch.device("cpu") if device_type == "cpu" else torch.device(device_type, index)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The fastest of the runs that fit the measuring time, after one to warm up."""
    run()
    fastest, stop = float("inf"), time.perf_counter() + SECONDS_PER_MEASUREMENT
    while fastest == float("inf") or time.perf_counter() < stop:
        if device.type in accelerator.GPUS:
            on = accelerator.module(device)
            with on.device(device):
                begin, end = on.Event(enable_timing=True), on.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                seconds = begin.elapsed_time(end) / 1000
        else:
            begin_time = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin_time
        fastest = min(fastest, seconds)
    return fastest
