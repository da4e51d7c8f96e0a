"""The Barlow Twins loss in plain, differentiable PyTorch: the truth that every other implementation is compared with.

It forms the (D, D) cross-correlation matrix as the paper's Algorithm 1 does (Zbontar et al. 2021, arXiv 2103.03230) and
leaves the gradient to autograd: simple, slow, and hungry for memory. Compare in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .normalization import Normalization


class BarlowTwinsTerms(NamedTuple):
    """The loss and its two sums: ``loss = scale * (on_diag + lambd * off_diag)``.

    Attributes:
        loss: Scalar.
        on_diag: Scalar, the invariance term, sum_i (C_ii - 1)^2.
        off_diag: Scalar, the redundancy reduction term, sum_{i != j} C_ij^2.
    """

    loss: Tensor  # []
    on_diag: Tensor  # [] the invariance term, sum_i (C_ii - 1)^2
    off_diag: Tensor  # [] the redundancy reduction term, sum_{i != j} C_ij^2


def standardize(z: Tensor, normalization: Normalization | None) -> Tensor:  # [N, D] -> [N, D]
    """``z`` with each feature standardised over the samples by the given convention (None: as it is)."""
    if normalization is None:
        return z
    centred = z - z.mean(dim=0)
    if normalization.eps_added_to == "variance":
        return centred / (z.var(dim=0, correction=normalization.correction) + normalization.eps).sqrt()
    return centred / (z.std(dim=0, correction=normalization.correction) + normalization.eps)


def reference_cross_correlation(z_a: Tensor, z_b: Tensor, normalization: Normalization | None) -> Tensor:  # [D, D]
    """C = A_hat^T B_hat / N."""
    return standardize(z_a, normalization).T @ standardize(z_b, normalization) / z_a.shape[0]


def reference_loss(
    z_a: Tensor,  # [N, D]
    z_b: Tensor,  # [N, D]
    lambd: float = 0.0051,
    scale: float = 1.0,
    normalization: Normalization | None = Normalization(),  # noqa: B008 - frozen
) -> BarlowTwinsTerms:
    """The loss and its two terms, exactly as the paper writes them. Computes in at least float32."""
    dtype = torch.promote_types(z_a.dtype, torch.float32)
    with torch.autocast(z_a.device.type, enabled=False):
        c = reference_cross_correlation(z_a.to(dtype), z_b.to(dtype), normalization)  # (D, D)
    diagonal = c.diagonal()
    on_diag = (diagonal - 1).square().sum()
    off_diag = (c - diagonal.diag_embed()).square().sum()
    return BarlowTwinsTerms(scale * (on_diag + lambd * off_diag), on_diag, off_diag)
