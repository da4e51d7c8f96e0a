"""How features are standardised over the samples of a batch, and the constants that its gradient needs.

Every implementation in use standardises each feature (column) of a projector output ``z`` of shape (N, D) as

    z_hat = (z - mean) * rstd

and they differ only in ``rstd``. This file holds that difference, once. The backward pass through any of them is

    dL/dz = rstd * (g - mean_n(g) - z_hat * kappa * mean_n(g * z_hat)),     g = dL/dz_hat

with one number per feature, ``kappa``, that depends on the convention:

    eps added to      rstd               kappa                    used by
    "variance"        1/sqrt(var + eps)  N/(N - c)                batch norm: the official code, lightly, solo-learn
    "deviation"       1/(std + eps)      N/((N - c) * std * rstd) MONAI, stable-pretraining

where c is the variance's correction: 0 for the biased variance, 1 for the unbiased one (``torch.var``'s default).
"""

from __future__ import annotations

import dataclasses
import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Normalization:
    """A convention for standardising features over samples.

    Args:
        correction: 0 for the biased variance (batch norm), 1 for the unbiased one (``torch.std``).
        eps: The small constant that keeps a constant feature finite; >= 0.
        eps_added_to: ``"variance"`` gives 1/sqrt(var + eps). ``"deviation"`` gives 1/(std + eps).

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value that is not accepted.
    """

    correction: int = 0
    eps: float = 1e-5
    eps_added_to: Literal["variance", "deviation"] = "variance"

    def __post_init__(self) -> None:
        if isinstance(self.correction, bool) or not isinstance(self.correction, int):
            raise TypeError(f"correction must be an int, got {type(self.correction).__name__}")
        if self.correction not in (0, 1):
            raise ValueError(f"correction must be 0 (biased variance) or 1 (unbiased), got {self.correction!r}")
        if isinstance(self.eps, bool) or not isinstance(self.eps, Real):
            raise TypeError(f"eps must be a float, got {type(self.eps).__name__}")
        if not math.isfinite(self.eps) or self.eps < 0:
            raise ValueError(f"eps must be finite and >= 0, got {self.eps}")
        object.__setattr__(self, "eps", float(self.eps))  # NumPy's numbers, too
        if self.eps_added_to not in ("variance", "deviation"):
            raise ValueError(f"eps_added_to must be 'variance' or 'deviation', got {self.eps_added_to!r}")

    def rstd(self, var: Tensor, n: int) -> Tensor:  # [D] -> [D]
        """The factor that standardises a centred feature, from its biased variance ``var`` over ``n`` samples."""
        if self.correction:
            var = torch.add(var, var, alpha=1 / (n - 1))  # times n / (n - 1), which rounding would bias
        return (var + self.eps).rsqrt() if self.eps_added_to == "variance" else 1 / (var.sqrt() + self.eps)

    def kappa(self, var: Tensor, n: int) -> Tensor | float:  # [D] -> [D], or one number for all features
        """The weight of the variance's part in the gradient (table above); 0 where a feature is constant."""
        unbias = n / (n - self.correction)
        if self.eps_added_to == "variance":
            return unbias
        std = (var * unbias).sqrt()
        return torch.where(std > 0, unbias * (std + self.eps) / std, torch.zeros_like(std))

    def remainder(self, rstd: Tensor) -> Tensor:  # [D] -> [D]
        """1 - kappa * mean_n(z_hat^2): how much of a gradient along z_hat itself passes through the normalisation."""
        return self.eps * rstd**self.remainder_power

    @property
    def remainder_power(self) -> int:
        """``remainder`` is eps times this power of rstd."""
        return 2 if self.eps_added_to == "variance" else 1


CONVENTIONS: dict[str, Normalization | None] = {
    "batch_norm": Normalization(correction=0, eps=1e-5, eps_added_to="variance"),
    "std": Normalization(correction=1, eps=1e-6, eps_added_to="deviation"),
    "none": None,
}


def resolve_normalization(
    normalization: str | Normalization,
    eps: float | None = None,
) -> Normalization | None:
    """The convention meant by a user's ``normalization`` and ``eps`` arguments; None leaves the inputs as they are."""
    if isinstance(normalization, Normalization):
        convention: Normalization | None = normalization
    elif isinstance(normalization, str):
        if normalization not in CONVENTIONS:
            accepted = ", ".join(map(repr, CONVENTIONS))
            raise ValueError(f"normalization must be {accepted} or a Normalization, got {normalization!r}")
        convention = CONVENTIONS[normalization]
    else:
        raise TypeError(f"normalization must be a str or a Normalization, got {type(normalization).__name__}")
    if eps is None:
        return convention
    if convention is None:
        raise ValueError(f"eps has no meaning with normalization='none', got eps={eps!r}")
    return dataclasses.replace(convention, eps=eps)
