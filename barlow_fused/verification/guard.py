"""Memory around every tensor that is allocated under it, filled with a pattern that nobody may change."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BAND = 1024  # bytes on each side
PATTERN = 0xA5
ALLOCATES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
FILLS = {torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default, torch.ops.aten.zeros_like.default}


class GuardBands(TorchDispatchMode):
    """What a call allocates, its results and workspaces, lies between two bands; so do inputs that it is given.

    >>> with GuardBands() as bands:
    ...     a, b = bands.around(z_a), bands.around(z_b)
    ...     loss = barlow_twins_loss(a, b)
    >>> assert bands.broken() == 0
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[tuple[Tensor, Tensor]] = []

    def around(self, x: Tensor) -> Tensor:
        """A copy of ``x`` between bands."""
        return self._between(x.shape, torch.empty_like(x, device="meta").stride(), x.dtype, x.device).copy_(x)

    def broken(self) -> int:
        """How many bytes of the bands have changed."""
        return sum(int((band != PATTERN).sum()) for bands in self._held for band in bands)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in ALLOCATES | FILLS or made.device.type == "meta" or made.numel() == 0:
            return made
        twin = self._between(made.shape, made.stride(), made.dtype, made.device)
        return twin.zero_() if func in FILLS else twin

    def _between(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        inner = extent * dtype.itemsize
        after = BAND + math.ceil(inner / 16) * 16 - inner  # starts right behind the last element
        raw = torch.full((BAND + inner + after,), PATTERN, dtype=torch.uint8, device=device)
        self._held.append((raw[:BAND], raw[BAND + inner :]))
        typed = raw[: len(raw) - len(raw) % dtype.itemsize].view(dtype)
        return typed.as_strided(tuple(shape), tuple(stride), BAND // dtype.itemsize)
