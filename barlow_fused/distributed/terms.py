"""Between the sums over the ranks and the terms of the loss: forward, and the gradients' way back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import BarlowTwinsTerms
from .part import Rules


def weights_of(grads: tuple[Tensor | None, ...], like: Tensor) -> Tensor:  # [3]
    """The gradients with respect to (loss, on_diag, off_diag)."""
    return torch.stack([like.new_zeros((), dtype=torch.float64) if g is None else g.double() for g in grads])


def weights_of_sums(weights: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """The gradients with respect to the two sums, on_diag and off_diag."""
    g_loss, g_on, g_off = weights.unbind()
    return g_on + g_loss * rules.scale, g_off + g_loss * (rules.scale * rules.lambd)


def terms_of(on_diag: Tensor, off_diag: Tensor, rules: Rules, dtype: torch.dtype) -> BarlowTwinsTerms:
    """The terms, from float64 sums."""
    off_diag = off_diag.clamp_min(0)
    return BarlowTwinsTerms(
        *(t.to(dtype) for t in (rules.scale * (on_diag + rules.lambd * off_diag), on_diag, off_diag))
    )
