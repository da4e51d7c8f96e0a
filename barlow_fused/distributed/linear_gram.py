"""The last layer's Gram route: activations are gathered, every rank makes all samples' z of its share of the features.

So a rank has what the loss's own Gram route has once its all-to-all is done, without one. The gradient of a rank's rows
of the weight is complete; the others' are zero, so that their sum over the ranks is the weight's gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.torch_partial import Result
from ..linear.chunks import Chunks, Sums, product_dtype
from ..reference import BarlowTwinsTerms
from .collectives import gather_samples, sum_over_ranks, sum_to_samples
from .part import Part
from .terms import common_weights, terms_of


def forward(h_a: Tensor, h_b: Tensor, weight: Tensor, part: Part) -> tuple[BarlowTwinsTerms, list[Tensor]]:
    """The terms, and what the backward pass needs."""
    rules = part.rules
    h = [gather_samples(h, part) for h in (h_a, h_b)]
    flats, taus, c, moments = _chunks(h, weight, part).sums()
    sums = [sum_over_ranks(flat, part) for flat in flats]
    wide = c.double()
    scalars = torch.cat([torch.stack([(wide - 1).square().sum(), wide.square().sum()]), *taus])
    dist.all_reduce(scalars, group=part.group)
    tau = scalars[2:].view(2, -1)
    dtype = product_dtype(h[0], part.d, rules.ops, rules.normalization)
    inner, product = rules.ops.join_gram(tuple(wait() for wait in sums), tau, part.segments().sizes, part.d, dtype)
    terms = terms_of(scalars[0], inner / part.n**2 - scalars[1], rules, c.dtype)
    return terms, [*h, weight, c, product, tau, *moments]


def backward(saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], part: Part) -> list[Tensor | None]:
    """The gradients of this rank's samples and of its features; None in place of one that is not needed."""
    h_a, h_b, weight, c, product, tau, *moments = saved
    w_on, w_off = common_weights(grads, c, part)
    sums = Sums(h_a, h_b, weight[part.columns], part.needs)
    result = Result("gram", part.n, part.d, product, c, tau, w_on, w_off)
    _chunks([h_a, h_b], weight, part).gradients(moments, result, sums)
    arrivals = [sum_to_samples(total, part) if total is not None else None for total in sums.of_h]
    of_weight = sums.of_weight
    if part.needs[2] and part.own_d is None:  # the others' rows are theirs
        of_weight = torch.zeros_like(weight)
        of_weight[part.columns] = sums.of_weight
    return [*(None if arrive is None else arrive().to(h_a.dtype) for arrive in arrivals), of_weight]


def _chunks(h: list[Tensor], weight: Tensor, part: Part) -> Chunks:
    rules = part.rules
    return Chunks(tuple(h), weight[part.columns], rules.ops, rules.normalization, part.segments(), part.rules.chunk)
