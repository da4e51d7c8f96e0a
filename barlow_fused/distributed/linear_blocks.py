"""The last layer's direct route, the weight's rows in shards: z of all samples and a rank's features (blocks.py)."""

from __future__ import annotations

from torch import Tensor

from ..linear.chunks import Sums
from ..reference import BarlowTwinsTerms
from . import blocks
from .collectives import gather_samples, sum_to_samples
from .part import Part


def forward(h_a: Tensor, h_b: Tensor, weight: Tensor, part: Part) -> tuple[BarlowTwinsTerms, list[Tensor]]:
    """The terms, and what the backward pass needs."""
    h_a, h_b = (gather_samples(h, part) for h in (h_a, h_b))
    terms, (_, _, *saved) = blocks.forward(h_a @ weight.T, h_b @ weight.T, _of_features(part))
    return terms, [h_a, h_b, weight, *saved]


def backward(saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], part: Part) -> list[Tensor | None]:
    """The gradients of this rank's samples and rows of the weight; None in place of one that is not needed."""
    h_a, h_b, weight, *rest = saved
    sums = Sums(h_a, h_b, weight, part.needs)
    of_views = tuple(map(sums.of_view, range(2)))
    z = h_a @ weight.T, h_b @ weight.T
    sums.add(slice(None), weight, blocks.backward((*z, *rest), grads, _of_features(part)._replace(needs=of_views)))
    arrivals = [sum_to_samples(total, part) if total is not None else None for total in sums.of_h]
    return [*(None if arrive is None else arrive().to(h_a.dtype) for arrive in arrivals), sums.of_weight]


def _of_features(part: Part) -> Part:
    """All samples are here, and features are shared over the ranks that had the samples."""
    return part._replace(group=None, rank=0, sizes=(part.n,), features=part.group)
