"""The direct route where features are in shards: a rank has its rows of C, (D / P, D), and no more.

One rank after the other sends its standardised features of view b, and every rank multiplies its own of view a with
them: a block of its rows. In the backward pass they are sent once more, for dL/dA_hat; then those of view a, with which
a rank makes the blocks of its columns of C again, one at a time, for dL/dB_hat: 8 N D^2 / P FLOPs in place of 6. Where
samples are in shards as well, statistics are combined and every block is summed over them.

"auto" comes here with D < 2 N. A rank holds D^2 / P numbers of C, a block of it, and a few arrays of (N, D / P).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import torch_partial
from ..backends.slabs import _matmul_t
from ..backends.torch_partial import Result, View
from ..reference import BarlowTwinsTerms
from .collectives import sum_now
from .direct import combine
from .part import Part
from .terms import terms_of, weights_of, weights_of_sums

ALL = slice(None)


def forward(z_a: Tensor, z_b: Tensor, part: Part) -> tuple[BarlowTwinsTerms, list[Tensor]]:
    """The terms, and what the backward pass needs."""
    views = _views(z_a, z_b, _moments(z_a, z_b, part), part)
    a_hat, b_hat = (view.slab(ALL) for view in views)
    rows = a_hat.new_empty(a_hat.shape[1], part.d)
    for columns, other, is_own in _blocks(b_hat, part):
        rows[:, columns] = _block(a_hat, other, part)
        if is_own:
            c = rows[:, columns].diagonal().clone()
            rows[:, columns].fill_diagonal_(0)
    wide = c.double()
    scalars = torch.stack([(wide - 1).square().sum(), torch.linalg.vecdot(rows, rows).sum(dtype=torch.float64)])
    sum_now(scalars, part.features)
    moments = [view.moments for view in views] if part.rules.normalization is not None else []
    return terms_of(scalars[0], scalars[1], part.rules, c.dtype), [z_a, z_b, rows, c, *moments]


def backward(saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], part: Part) -> list[Tensor | None]:
    """The gradients of this rank's samples and features; None in place of one that is not needed."""
    z_a, z_b, rows, c, *moments = saved
    views = _views(z_a, z_b, moments or [None, None], part)
    a_hat, b_hat = (view.slab(ALL) for view in views)
    result = Result("direct", part.n, part.d, rows, c, None, *weights_of_sums(weights_of(grads, c), part.rules))
    of_a = of_b = None
    if part.needs[0]:
        g = torch.zeros_like(a_hat)
        for columns, other, _ in _blocks(b_hat, part):
            g += _matmul_t(other, rows[:, columns], other.dtype)
        of_a = _input_grad(views, 0, a_hat, b_hat, g, torch.linalg.vecdot(rows, rows), result)
    if part.needs[1]:
        g, squares = torch.zeros_like(b_hat), torch.zeros_like(c)
        for _, other, is_own in _blocks(a_hat, part):
            block = _block(other, b_hat, part)
            if is_own:
                block.fill_diagonal_(0)
            g += _matmul_t(other, block.T, other.dtype)
            squares += block.square().sum(0)
        of_b = _input_grad(views, 1, b_hat, a_hat, g, squares, result)
    return [of_a, of_b]


def _input_grad(
    views: list[View], view: int, own_hat: Tensor, other_hat: Tensor, g: Tensor, squares: Tensor, result: Result
) -> Tensor:
    """dL/dz from the sum of blocks of C times the other view; ``squares``: of C's rows or columns of these features."""
    alpha, d = result.factors
    g = g.mul_(alpha).addcmul_(other_hat, d)
    mean = (squares * alpha + d * result.c)[None]
    return torch_partial.through_normalization(views[view], view, own_hat, g, result, ALL, mean).to(views[view].z.dtype)


def _moments(z_a: Tensor, z_b: Tensor, part: Part) -> list[Tensor | None]:
    if part.rules.normalization is None:
        return [None, None]
    moments = [torch_partial.moments(z, (len(z),)) for z in (z_a, z_b)]
    return moments if part.group is None else list(combine(torch.stack(moments), part))


def _views(z_a: Tensor, z_b: Tensor, moments: list[Tensor | None], part: Part) -> list[View]:
    segments = part.segments()
    return [View(z, m, part.rules.normalization, segments) for z, m in zip((z_a, z_b), moments, strict=True)]


def _block(a: Tensor, b: Tensor, part: Part) -> Tensor:  # [n, D_r], [n, D_s] -> [D_r, D_s]
    block = _matmul_t(a.T, b.T, a.dtype)
    return sum_now(block, part.group).div_(part.n)


def _blocks(hat: Tensor, part: Part) -> Iterator[tuple[slice, Tensor, bool]]:
    """Each rank's standardised features, where they stand among all, and whether they are this rank's own."""
    group, start = part.features, 0
    widths = hat.new_zeros(group.size(), dtype=torch.int64)
    widths[group.rank()] = hat.shape[1]
    for rank, width in enumerate(sum_now(widths, group).tolist()):
        is_own = rank == group.rank()
        block = hat.contiguous() if is_own else hat.new_empty(len(hat), width)
        dist.broadcast(block, dist.get_global_rank(group, rank), group=group)
        yield slice(start, start + width), block, is_own
        start += width
