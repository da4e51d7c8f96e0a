"""PyTorch as on machines with other makers' GPUs: its modules say so, and nothing can run."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from barlow_fused import backends
from barlow_fused.backends import accelerator, cuda_backend
from barlow_fused.backends.triton_kernels import configs

H200 = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 141 * 2**30}
MI300X = {"name": "AMD Instinct MI300X", "major": 9, "minor": 4, "gcnArchName": "gfx942:sramecc+:xnack-",
          "multi_processor_count": 304, "total_memory": 192 * 2**30}  # fmt: skip
RX7900 = {"name": "AMD Radeon RX 7900 XTX", "major": 11, "minor": 0, "gcnArchName": "gfx1100",
          "multi_processor_count": 48, "total_memory": 24 * 2**30}  # fmt: skip
MI60 = {**MI300X, "name": "AMD Radeon VII", "gcnArchName": "gfx906:sramecc-:xnack-"}
MAX1550 = {"name": "Intel(R) Data Center GPU Max 1550", "gpu_subslice_count": 64, "has_fp64": 1, "architecture": 13,
           "driver_version": "1.6.31294", "local_mem_size": 128 * 2**10, "total_memory": 64 * 2**30}  # fmt: skip
ARC = {**MAX1550, "name": "Intel(R) Arc(TM) A770 Graphics", "gpu_subslice_count": 32, "has_fp64": 0,
       "local_mem_size": 64 * 2**10}  # fmt: skip


@contextmanager
def machine(*properties: dict, hip: str | None = None) -> Iterator[list]:
    """These GPUs, AMD's where ``hip`` is a version; the list has the devices that were made the current one."""
    entered: list = []
    intel = bool(properties) and "has_fp64" in properties[0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted)
        yield

    with pytest.MonkeyPatch.context() as patch:
        for kind in accelerator.GPUS:
            module = getattr(torch, kind)
            found = properties if intel == (kind == "xpu") else ()
            patch.setattr(module, "is_available", lambda found=found: bool(found))
            patch.setattr(module, "device_count", lambda found=found: len(found))
            patch.setattr(
                *(module, "get_device_properties"),
                lambda wanted, found=found: types.SimpleNamespace(**found[torch.device(wanted).index or 0]),
            )
            patch.setattr(module, "current_device", lambda: 0)
            patch.setattr(module, "device", device)
        patch.setattr(torch.version, "hip", hip)
        patch.setattr(torch.version, "cuda", None if hip or intel else "13.0")
        if intel:
            patch.setattr(torch.version, "xpu", "20250302", raising=False)
        forget()
        yield entered
    forget()


def forget() -> None:
    """What was found out about devices."""
    for cached in (accelerator.of, backends._why_no_triton, cuda_backend.why_not_here, configs.chip_of):
        cached.cache_clear()
