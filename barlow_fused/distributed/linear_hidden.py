"""The last layer's hidden route: the ranks' triangular factors make one for all samples, and they share the features.

A rank decomposes its own activations (linear/hidden.py). The factors, (min(n_r, H), H), are gathered; rank 0 decomposes
them once more, one below the other, which is the decomposition of all samples (tall-skinny QR, Demmel et al. 2012), and
sends it to all: each then has the same numbers, which two machines' own decompositions need not be. With each rank's
own statistics the factors stay as they are: each is a segment. What travels has min(n_r, H) H numbers a rank and view.

Sums over features, (R, R), and in the backward pass (R, H), are summed over the ranks. The gradient of a rank's rows of
the weight is complete; the others' are zero, so that their sum over the ranks is the weight's gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..linear.hidden import Basis, Features, decompose, norm
from ..linear.slabs import activations
from ..reference import BarlowTwinsTerms
from .collectives import gather, sum_over_ranks
from .part import Part
from .terms import common_weights, terms_of


def forward(h_a: Tensor, h_b: Tensor, weight: Tensor, part: Part) -> tuple[BarlowTwinsTerms, list[Tensor]]:
    """The terms, and what the backward pass needs."""
    basis = _basis(h_a, h_b, part)
    t, c = _features(basis, weight, part).sums()
    wide = c.double()
    scalars = torch.stack([(wide - 1).square().sum(), wide.square().sum()])
    arrive = sum_over_ranks(t, part)
    dist.all_reduce(scalars, group=part.group)
    t = arrive()
    terms = terms_of(scalars[0], norm(t, basis.j) - scalars[1], part.rules, c.dtype)
    return terms, [weight, t, c, *basis]


def backward(saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], part: Part) -> list[Tensor | None]:
    """The gradients of this rank's samples and of its features; None in place of one that is not needed."""
    weight, t, c, *basis = saved
    features = _features(Basis(*basis), weight, part)
    w_on, w_off = common_weights(grads, c, part)
    sums, of_shard = features.gradients(t, c, w_on, w_off, part.needs)
    if any(part.needs[:2]):
        sums = sum_over_ranks(sums, part)()
    of_weight = of_shard
    if part.needs[2] and part.own_d is None:  # the others' rows are theirs
        of_weight = torch.zeros_like(weight)
        of_weight[part.columns] = of_shard
    segment = part.rank if part.local else 0
    of_h = [
        features.of_activations(view, sums, segment).to(weight.dtype) if part.needs[view] else None for view in range(2)
    ]
    return [*of_h, of_weight]


def _features(basis: Basis, weight: Tensor, part: Part) -> Features:
    counts = part.sizes if part.local else (part.n,)
    return Features(basis, weight[part.columns], counts, part.rules.normalization, part.rules.chunk)


def _basis(h_a: Tensor, h_b: Tensor, part: Part) -> Basis:
    """Of all ranks' samples, the same on each; of their own, this rank's."""
    standardizes = part.rules.normalization is not None
    h = activations(h_a, h_b, centred=part.local).double()
    if standardizes:
        total = h.sum(1, keepdim=True)
        if not part.local:
            dist.all_reduce(total, group=part.group)
        h -= total / (h.shape[1] if part.local else part.n)
    own, factor = decompose(h, h.shape[1] if part.local else part.n)
    rows = min(max(part.sizes), h.shape[2])
    missing = rows - factor.shape[1]  # of a rank with fewer samples than others
    own, factor = torch.nn.functional.pad(own, (0, missing)), torch.nn.functional.pad(factor, (0, 0, 0, missing))
    parts = gather(torch.cat([factor.flatten(), (own[0].mT @ own[1]).flatten()]), part.group)
    factors = parts[:, : factor.numel()].view(-1, *factor.shape).transpose(0, 1)  # (2, P, rows, H)
    products = parts[:, factor.numel() :].view(-1, rows, rows)
    if part.local:
        return Basis(own, factors.contiguous(), torch.block_diag(*products))
    stacked = factors.flatten(1, 2)  # (2, P rows, H)
    size = min(stacked.shape[1:])
    turn, r = stacked.new_zeros(2, len(products), rows, size), stacked.new_zeros(2, 1, size, h.shape[2])
    j = stacked.new_zeros(size, size)
    if part.rank == 0:
        turn, r = decompose(stacked, 1)
        turn, r = turn.view(2, len(products), rows, size), r[:, None]
        j = (turn[0].mT @ products @ turn[1]).sum(0)
    numbers = torch.cat([x.flatten() for x in (turn, r, j)])
    dist.all_reduce(numbers, group=part.group)  # the others' are zeros
    parts = numbers.split([x.numel() for x in (turn, r, j)])
    turn, r, j = (x.view_as(like) for x, like in zip(parts, (turn, r, j), strict=True))
    return Basis(own @ turn[:, part.rank], r, j)
