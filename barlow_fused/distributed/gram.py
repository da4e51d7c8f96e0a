"""The Gram route, feature-sharded: samples become features by all-to-all, K is summed, gradients travel back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.torch_partial import Result
from ..reference import BarlowTwinsTerms
from .collectives import sum_now, sum_over_ranks, to_features, to_samples
from .part import Part
from .terms import terms_of, weights_of_sums, weights_over_ranks


def forward(z_a: Tensor, z_b: Tensor, part: Part) -> tuple[BarlowTwinsTerms, list[Tensor]]:
    """The terms, and what the backward pass needs."""
    rules, ops, segments = part.rules, part.rules.ops, part.segments()
    arrivals = [to_features(z, part) for z in (z_a, z_b)]  # both are on their way
    views, taus, sums = [], [], []
    for arrive in arrivals:
        shard = arrive()  # (N, D / P)
        moments = None if rules.normalization is None else ops.moments(shard, segments.sizes)
        views.append(ops.View(shard, moments, rules.normalization, segments))
        k, tau = ops.partial_gram(views[-1])
        taus.append(tau)
        sums.append(sum_over_ranks(k, part))
    c = ops.diagonal(*views).div_(part.n)  # (D / P,)
    wide = c.double()
    scalars = torch.cat([torch.stack([(wide - 1).square().sum(), wide.square().sum()]), *taus])
    sum_now(scalars, part.group, part.features)
    tau = scalars[2:].view(2, -1)
    inner, product = ops.join_gram(tuple(wait() for wait in sums), tau, segments.sizes, part.d, views[0].product_dtype)
    terms = terms_of(scalars[0], inner / part.n**2 - scalars[1], rules, c.dtype)
    moments = [] if rules.normalization is None else [view.moments for view in views]
    return terms, [views[0].z, views[1].z, c, product, tau, *moments]


def backward(saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], part: Part) -> list[Tensor | None]:
    """The gradients of this rank's samples; None in place of one that is not needed."""
    rules, ops, segments = part.rules, part.rules.ops, part.segments()
    *shards, c, product, tau = saved[:5]
    moments = saved[5:] or (None, None)
    views = [ops.View(z, m, rules.normalization, segments) for z, m in zip(shards, moments, strict=True)]
    per_rank = weights_over_ranks(grads, c, part)

    def gradient(view: int, w_on: Tensor, w_off: Tensor) -> Tensor:  # [N, D / P]
        return ops.input_grad(views, view, Result("gram", part.n, part.d, product, c, tau, w_on, w_off))

    arrivals: list[Callable[[], Tensor] | None] = [None, None]
    for view in (view for view in range(2) if part.needs[view]):
        if len(per_rank) == 1:
            grad = gradient(view, *weights_of_sums(per_rank[0], rules))
        else:  # a gradient is linear in the two weights, which differ from rank to rank
            on, off = (torch.stack(w) for w in zip(*(weights_of_sums(w, rules) for w in per_rank), strict=True))
            largest = [w.abs().max().clamp_min(torch.finfo(torch.float32).tiny) for w in (on, off)]
            zero = torch.zeros_like(largest[0])
            parts = [gradient(view, largest[0], zero), gradient(view, zero, largest[1])]
            grad = torch.cat(
                [
                    sum(g * (w[rank] / most) for g, w, most in zip(rows, (on, off), largest, strict=True))
                    for rank, rows in enumerate(zip(*(g.split(part.sizes) for g in parts), strict=True))
                ]
            )
        arrivals[view] = to_samples(grad, part)
    return [None if arrive is None else arrive() for arrive in arrivals]
