"""A backend's operations on one rank's part of a batch, put together in one process as two ranks would.

What distributed/gram.py and distributed/direct.py do between collectives, with sums in place of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.torch_partial import Result, Segments
from ..normalization import CONVENTIONS
from ..reference import BarlowTwinsTerms
from .record import Unit

CONVENTION = CONVENTIONS["batch_norm"]


def run(
    unit: Unit, z_a: Tensor, z_b: Tensor, segments: int, lambd: float
) -> tuple[BarlowTwinsTerms, tuple[Tensor, Tensor]]:
    """The terms and both gradients of two ranks, standardised over all samples (1 segment) or each rank's own (2)."""
    n = len(z_a)
    sizes = (n // segments,) * segments
    if unit.route == "gram":
        return _gram(backends.load_partial(unit.backend), z_a, z_b, sizes, lambd)
    return _direct(backends.load_partial(unit.backend), z_a, z_b, sizes, lambd)


def _gram(ops, z_a: Tensor, z_b: Tensor, sizes: tuple[int, ...], lambd: float):  # noqa: ANN001
    """Each rank has all samples of half of the features."""
    n, d = z_a.shape
    segments = Segments(sizes, sizes, (1.0,) * len(sizes))
    shards = [[z[:, : d // 2].contiguous(), z[:, d // 2 :].contiguous()] for z in (z_a, z_b)]
    views = [[ops.View(z, ops.moments(z, sizes), CONVENTION, segments) for z in both] for both in shards]
    parts = [[ops.partial_gram(view) for view in both] for both in views]
    flats = tuple(first[0] + second[0] for first, second in parts)
    taus = torch.stack([first[1] + second[1] for first, second in parts])
    cs = [ops.diagonal(a, b) / n for a, b in zip(*views, strict=True)]
    inner, product = ops.join_gram(flats, taus, sizes, d, views[0][0].product_dtype)
    wide = torch.cat(cs).double()
    terms = _terms((wide - 1).square().sum(), inner / n**2 - wide.square().sum(), lambd)
    one = torch.ones((), dtype=torch.float64, device=z_a.device)
    grads = [
        [
            ops.input_grad(
                [views[0][rank], views[1][rank]], view, Result("gram", n, d, product, c, taus, one, one * lambd)
            )
            for rank, c in enumerate(cs)
        ]
        for view in range(2)
    ]
    return terms, tuple(torch.cat(both, 1) for both in grads)


def _direct(ops, z_a: Tensor, z_b: Tensor, sizes: tuple[int, ...], lambd: float):  # noqa: ANN001
    """Each rank has half of the samples."""
    n, d = z_a.shape
    half = n // 2
    local = len(sizes) == 2
    segments = Segments((half,), (half if local else n,), (1.0,))
    parts = [z.split(half) for z in (z_a, z_b)]
    moments = [[ops.moments(part if local else z, (len(part) if local else n,)) for part in parts[i]]
               for i, z in enumerate((z_a, z_b))]  # fmt: skip
    views = [
        [ops.View(part, m, CONVENTION, segments) for part, m in zip(parts[i], moments[i], strict=True)]
        for i in range(2)
    ]
    pairs = list(zip(*views, strict=True))
    product = sum(ops.partial_correlate(*pair).float() for pair in pairs) / n
    c = sum(ops.diagonal(*pair) for pair in pairs) / n
    product.fill_diagonal_(0)
    terms = _terms((c.double() - 1).square().sum(), product.double().square().sum(), lambd)
    one = torch.ones((), dtype=torch.float64, device=z_a.device)
    total = Result("direct", n, d, product, c, None, one, one * lambd)
    grads = tuple(torch.cat([ops.input_grad(list(pair), view, total) for pair in pairs]) for view in range(2))
    return terms, grads


def _terms(on_diag: Tensor, off_diag: Tensor, lambd: float) -> BarlowTwinsTerms:
    return BarlowTwinsTerms(on_diag + lambd * off_diag, on_diag, off_diag)
