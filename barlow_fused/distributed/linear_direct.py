"""The last layer's direct route: in each pass a rank makes z of its samples, no larger than C or the batch's K."""

from __future__ import annotations

from torch import Tensor

from ..linear.chunks import Sums
from ..reference import BarlowTwinsTerms
from . import direct
from .part import Part


def forward(h_a: Tensor, h_b: Tensor, weight: Tensor, part: Part) -> tuple[BarlowTwinsTerms, list[Tensor]]:
    """The terms, and what the backward pass needs."""
    terms, (_, _, *saved) = direct.forward(h_a @ weight.T, h_b @ weight.T, part)
    return terms, [h_a, h_b, weight, *saved]


def backward(saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], part: Part) -> list[Tensor | None]:
    """The gradients that this rank's samples make; None in place of one that is not needed."""
    h_a, h_b, weight, *rest = saved
    sums = Sums(h_a, h_b, weight, part.needs)
    of_views = tuple(map(sums.of_view, range(2)))
    z = h_a @ weight.T, h_b @ weight.T
    sums.add(slice(None), weight, direct.backward((*z, *rest), grads, part._replace(needs=of_views)))
    return list(sums.result())
