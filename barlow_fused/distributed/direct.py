"""The direct route: every rank keeps its samples; statistics are combined, and C is summed over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.torch_partial import Result
from ..reference import BarlowTwinsTerms
from .collectives import gather, sum_over_ranks
from .part import Part
from .terms import terms_of, weights_of, weights_of_sums


def forward(z_a: Tensor, z_b: Tensor, part: Part) -> tuple[BarlowTwinsTerms, list[Tensor]]:
    """The terms, and what the backward pass needs."""
    rules, ops, segments = part.rules, part.rules.ops, part.segments()
    moments: list[Tensor | None] = [None, None]
    if rules.normalization is not None:
        moments = [ops.moments(z, (z.shape[0],)) for z in (z_a, z_b)]
        if not part.local:
            moments = list(combine(torch.stack(moments), part))
    views = [ops.View(z, m, rules.normalization, segments) for z, m in zip((z_a, z_b), moments, strict=True)]
    d = part.d
    summed = sum_over_ranks(torch.cat([ops.partial_correlate(*views).view(-1), ops.diagonal(*views)]), part)()
    summed /= part.n
    product, c = summed[: d * d].view(d, d), summed[d * d :]
    product.fill_diagonal_(0)
    off_diag = torch.linalg.vecdot(product, product).sum(dtype=torch.float64)
    terms = terms_of((c.double() - 1).square().sum(), off_diag, rules, c.dtype)
    return terms, [z_a, z_b, summed, *(m for m in moments if m is not None)]


def backward(saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], part: Part) -> list[Tensor | None]:
    """The gradients of this rank's samples; None in place of one that is not needed."""
    rules, ops, segments = part.rules, part.rules.ops, part.segments()
    z_a, z_b, summed = saved[:3]
    moments = saved[3:] or (None, None)
    views = [ops.View(z, m, rules.normalization, segments) for z, m in zip((z_a, z_b), moments, strict=True)]
    product, c = summed[: part.d**2].view(part.d, part.d), summed[part.d**2 :]
    weights = weights_of(grads, c)
    if rules.gradient == "lightly":  # the gradient of the sum of all ranks' losses
        dist.all_reduce(weights, group=part.group)
    w_on, w_off = weights_of_sums(weights, rules)
    total = Result("direct", part.n, part.d, product, c, None, w_on, w_off)
    return [ops.input_grad(views, view, total) if part.needs[view] else None for view in range(2)]


def combine(moments: Tensor, part: Part) -> Tensor:  # [2, 3, 1, D] -> [2, 3, 1, D]
    """The moments of all ranks' samples from those of each rank's, in float64 (Chan et al. 1979)."""
    mean, residual, var = moments.double().unbind(1)
    own = torch.stack((mean + residual, var))  # (2, 2, 1, D): mean and variance of both views
    share = torch.tensor(part.sizes, dtype=own.dtype, device=own.device).div_(part.n).view(-1, 1, 1, 1)
    gathered = gather(own, part.group)
    if min(part.sizes) == 0:  # what has no samples has no mean
        gathered = torch.where(share[:, None] > 0, gathered, 0.0)
    means, variances = gathered.unbind(1)  # (P, 2, 1, D)
    mean = (means * share).sum(0)
    var = ((variances + (means - mean).square()) * share).sum(0)
    rounded = mean.to(moments.dtype)
    return torch.stack((rounded, (mean - rounded).to(moments.dtype), var.to(moments.dtype)), 1)
