"""What a benchmark ran on: hardware, versions, commit, free memory, and the rate of a matrix product."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import barlow_fused
from barlow_fused.backends import accelerator
from barlow_fused.backends.slabs import _matmul_t

from .inputs import cache_bytes

ROOT = Path(__file__).resolve().parent.parent
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # larger than the caches
PACKAGES = ("torch", "triton", "lightly")


def describe_machine(device: torch.device) -> dict[str, Any]:
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "cuda": torch.version.cuda,
            "runtime": accelerator.runtime(),
        }
    return {
        "cpu": f"{_cpu_model()} ({torch.backends.cpu.get_cpu_capability()})",  # "AMD EPYC (AVX2)"
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "gpu": gpu,
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "barlow_fused": barlow_fused.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state() -> dict[str, Any]:
    """The commit of the checkout, and whether files differ from it; None where git cannot say.

    On a copy that has no .git the variable GIT_COMMIT can say it.
    """
    status = _output("git", "-C", str(ROOT), "status", "--porcelain")
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return {"commit": commit or os.environ.get("GIT_COMMIT"), "dirty": None if status is None else bool(status)}


def free_memory(device: torch.device) -> float:
    """Bytes that can be taken right now; on Linux within the control group's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = float(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(cached["inactive_file"])
    except (OSError, KeyError):
        return free
    return free if limit == "max" else min(free, float(limit) - used)


def matrix_product_rates(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> dict[str, list[float]]:
    """FLOP/s of a square product, by torch.mm and by the routine that barlow_fused's PyTorch backend multiplies with.

    On CPUs in float32, in which that backend computes half-precision inputs too (float64 for float64).
    """
    size = MATRIX_SIZE[device.type]
    if device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x, y = torch.randn(2, size, size, device=device, dtype=wide, generator=generator).to(dtype)
    routines = {"torch.mm": lambda: torch.mm(x, y), "barlow_fused": lambda: _matmul_t(x, y, dtype)}
    rates: dict[str, list[float]] = {name: [] for name in routines}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, multiply in routines.items():
            _synchronize(device)
            start = time.perf_counter()
            multiply()
            _synchronize(device)
            if repeat:
                rates[name].append(2 * size**3 / (time.perf_counter() - start))
    return rates


def bandwidths(device: torch.device, repeats: int = 3) -> list[float]:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for repeat in range(repeats + 1):  # the first is a warm-up
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        if repeat:
            rates.append(2 * source.nbytes / (time.perf_counter() - start))
    return rates


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _output(*command: str) -> str | None:
    """A command's output; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
