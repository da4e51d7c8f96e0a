"""The inputs: two correlated views, and enough sets of them that no cache holds what a call reads."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

Views = tuple[Tensor, Tensor]  # z_a, z_b: (N, D) each, both want gradients

MAX_SETS = 128
SYSFS_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CPU_CACHE = 2**25


def make_inputs(n: int, d: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Views:
    """Two correlated views (C_ii about 0.8) whose features have means and scales of their own; both want gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    shared = torch.randn(n, d, **options)
    views = []
    for _ in range(2):
        z = torch.randn(n, d, **options).mul_(0.5).add_(shared)
        z.mul_(torch.rand(d, **options) + 0.5).add_(torch.randn(d, **options))
        views.append(z.to(dtype).requires_grad_())
    return views[0], views[1]


def rotating_sets(z_a: Tensor, z_b: Tensor) -> list[Views]:
    """This set and so many more that, when its turn comes again, twice the cache has been read in between.

    The others have the same samples in another order: as hard to compute, at other addresses.
    """
    count = min(MAX_SETS, math.ceil(2 * cache_bytes(z_a.device) / (z_a.nbytes + z_b.nbytes)) + 1)
    with torch.no_grad():
        rolled = [tuple(z.roll(i, 0).requires_grad_() for z in (z_a, z_b)) for i in range(1, count)]
    return [(z_a, z_b), *rolled]


def cache_bytes(device: torch.device) -> int:
    """The largest cache between the processor and its memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in SYSFS_CACHES.glob("index*/size")]  # "32768K"
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=UNKNOWN_CPU_CACHE)
