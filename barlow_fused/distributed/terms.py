"""Between the sums over the ranks and the terms of the loss: forward, and the gradients' way back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference import BarlowTwinsTerms
from .part import Part, Rules


def weights_of(grads: tuple[Tensor | None, ...], like: Tensor) -> Tensor:  # [3]
    """The gradients with respect to (loss, on_diag, off_diag)."""
    return torch.stack([like.new_zeros((), dtype=torch.float64) if g is None else g.double() for g in grads])


def weights_over_ranks(grads: tuple[Tensor | None, ...], like: Tensor, part: Part) -> Tensor:  # [1, 3] or [P, 3]
    """The same of all ranks: one for all of them where it is the same for all their samples."""
    weights = weights_of(grads, like)
    if part.group is None:
        return weights[None]
    if part.rules.gradient == "lightly":  # the gradient of the sum of all ranks' losses
        dist.all_reduce(weights, group=part.group)
        return weights[None]
    per_rank = weights.new_zeros(len(part.sizes), 3)  # of each rank's loss for its own samples
    per_rank[part.rank] = weights
    dist.all_reduce(per_rank, group=part.group)  # not a gather: it must never meet the header of a rank ahead
    return per_rank[:1] if bool((per_rank == per_rank[0]).all()) else per_rank


def common_weights(grads: tuple[Tensor | None, ...], like: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """``weights_of_sums`` of ``weights_over_ranks``, which must be the same on all ranks."""
    weights = weights_over_ranks(grads, like, part)
    if len(weights) > 1:
        raise RuntimeError(
            "the ranks use the loss in different ways: with the last layer in it, gradient='official' must meet the "
            "same gradient of the loss on every rank (gradient='lightly' sums them)"
        )
    return weights_of_sums(weights[0], part.rules)


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
