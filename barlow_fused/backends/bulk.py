"""The bulk of K, which is left out of its sums where features are many.

Where D is much larger than N, K is close to D (I - 1 1^T / N), and K A_hat to D A_hat, which the normalisation's
gradient removes: float32 would round the little that remains of it to the precision of what is removed (gradient error
7e-6 at N=32 D=65536). K = tau N / (N - 1) (I - 1 1^T / N) + E, where E is small if features are independent. So E is
summed: its diagonal by itself, as x_hat^2 less its mean, and the others with tau / (N - 1) added. What the
normalisation leaves of the bulk is added to the gradient in closed form. E has no trace and 1^T E = 0, so

    <K_a, K_b> = <E_a, E_b> + (N - 1) tau_a tau_b
"""

from __future__ import annotations

import torch
from torch import Tensor

from .slabs import Normalized, _scalar

RATIO = 32  # D / N from which K's bulk is left out


def is_left_out(x: Normalized) -> bool:
    """Whether K's bulk is left out. Where features are few, K may be anything, and far from its bulk."""
    n, d = x.z_a.shape
    return x.normalization is not None and d >= RATIO * n


def tau(x: Normalized) -> Tensor:  # [2] float64
    """tau / D of both views."""
    n, d = x.z_a.shape
    rstd, var = x.stats[:2]
    return (var * rstd).mul_(rstd).sum((1, 2), dtype=torch.float64).mul_(n / (n - 1) / d)


def inner(x: Normalized) -> Tensor | float:
    """What the bulk adds to <K_a, K_b> / D^2."""
    return (len(x.z_a) - 1) * _scalar(tau(x).prod()) if is_left_out(x) else 0.0


def of_own(x: Normalized, rstd_alpha: Tensor) -> Tensor:  # [2, 1, D]
    """What the bulk leaves of itself in the gradient: a multiple of A_hat, and of B_hat."""
    rstd = x.stats[0]
    return rstd_alpha * tau(x).flip(0).to(rstd.dtype)[:, None, None] * x.normalization.remainder(rstd)
