"""What the backends of kernels, triton and cuda, carry from one operation to the next: tensors, or a plan's arrays."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ..normalization import Normalization
from .arrays import Array

Matrix = Tensor | Array


@dataclasses.dataclass(frozen=True)
class Normalized:
    """Two views, standardised, and every feature's statistics."""

    z_a: Matrix  # [N, D]
    z_b: Matrix  # [N, D]
    normalization: Normalization | None  # None: A_hat and B_hat are the inputs themselves
    hats: Matrix | None  # [2, N, D] A_hat and B_hat
    stats: Matrix  # [rows, D] float32, those that the backend's kernels name; at least c
    sums: Matrix | None = None  # [2, slabs] float64: of (c_i - 1)^2 and of c_i^2; forward only
    counters: Matrix | None = None  # int32 zeros for the kernel that comes next; forward only

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied."""
        return self.z_a.dtype if self.hats is None else self.hats.dtype

    @property
    def raw(self) -> bool:
        """Whether A_hat and B_hat are rounded, so that z itself is the better source where it can be used."""
        return self.hats is not None and self.hats.dtype != torch.float32

    @functools.cached_property
    def views(self) -> tuple[Matrix, Matrix]:  # [N, D], [N, D]
        """A_hat and B_hat."""
        return (self.z_a, self.z_b) if self.hats is None else self.hats.unbind()
