"""What the backends of kernels, triton and cuda, carry from one operation to the next."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ..normalization import Normalization
from ..reference import BarlowTwinsTerms


@dataclasses.dataclass(frozen=True)
class Normalized:
    """Two views, standardised, and every feature's statistics."""

    z_a: Tensor  # [N, D]
    z_b: Tensor  # [N, D]
    normalization: Normalization | None  # None: A_hat and B_hat are the inputs themselves
    hats: Tensor | None  # [2, N, D] A_hat and B_hat
    stats: Tensor  # [rows, D] float32, those that the backend's kernels name; at least c
    sums: Tensor | None = None  # [2, slabs] float64: of (c_i - 1)^2 and of c_i^2; forward only
    counters: Tensor | None = None  # int32 zeros for the kernel that comes next; forward only

    def saved(self) -> list[Tensor]:
        """What a backward pass needs, beside the inputs, to build this again."""
        return [self.stats] if self.hats is None else [self.stats, self.hats]

    @classmethod
    def from_saved(
        cls, z_a: Tensor, z_b: Tensor, normalization: Normalization | None, saved: list[Tensor]
    ) -> Normalized:
        """Build again what ``saved`` was taken from."""
        return cls(z_a, z_b, normalization, saved[1] if normalization is not None else None, saved[0])

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied."""
        return self.z_a.dtype if self.hats is None else self.hats.dtype

    @property
    def raw(self) -> bool:
        """Whether A_hat and B_hat are rounded, so that z itself is the better source where it can be used."""
        return self.hats is not None and self.hats.dtype != torch.float32

    @functools.cached_property
    def views(self) -> tuple[Tensor, Tensor]:  # [N, D], [N, D]
        """A_hat and B_hat."""
        return (self.z_a, self.z_b) if self.hats is None else self.hats.unbind()


def empty_terms(z: Tensor) -> BarlowTwinsTerms:
    """Room for the three terms."""
    return BarlowTwinsTerms(*(torch.empty((), dtype=torch.float32, device=z.device) for _ in range(3)))
