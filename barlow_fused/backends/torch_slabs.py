"""The four operations for CPUs, by PyTorch's operators: the Gram route. torch_direct.py has the direct one, and
torch_small.py the passes of small inputs.

Standardised features are not stored. Each operation walks over slabs of features, standardises a slab, multiplies it
and drops it, so the inputs are the only (N, D) arrays that travel from memory, and the extra memory is the product plus
a few slabs.

Means are removed twice: the first mean is rounded to the inputs' precision, and that of a few samples; the mean of what
is left removes what it leaves, so that features with |mean|/std = 1000 lose nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..normalization import Normalization
from ..reference import BarlowTwinsTerms
from . import bulk, torch_direct
from .operations import Weights
from .slabs import (
    _ALL,
    MEANS,
    Normalized,
    _compute_dtype,
    _cut,
    _like,
    _matmul_t,
    _narrow,
    _scalar,
    _slabs,
    _terms_of_gram,
    _view,
    sums_of,
    weights_of,
    without_rest,
)
from .torch_direct import _add

__all__ = ["Normalized", "correlate", "empty_saved", "gram", "input_grad", "normalize"]

PANEL = 128  # rows of the lower-triangle panels of a symmetric product


def normalize(z_a: Tensor, z_b: Tensor, normalization: Normalization | None) -> Normalized:
    """Nothing yet: which statistics are needed, and in which order, depends on the route."""
    return Normalized(z_a, z_b, normalization)


def empty_saved(z_a: Tensor, route: str, normalization: Normalization | None) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of [product, *saved]."""
    n, d = z_a.shape
    c = z_a.new_empty(d, dtype=_compute_dtype(z_a))
    saved = [c.new_empty((2, n, n) if route == "gram" else (d, d)), c]
    if normalization is None:
        return saved
    return saved + (torch_direct.empty_stats(z_a) if route == "direct" else [c.new_empty(2, 1, d) for _ in range(4)])


def correlate(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and C with its diagonal set to 0, (D, D)."""
    return torch_direct.correlate(x, lambd, scale)


def gram(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and K_a / D and K_b / D less their bulk (bulk.py), stacked, (2, N, N). 2 to 4 N^2 D FLOPs.

    In one walk over the inputs: a slab is standardised, multiplied with itself, and dropped.
    """
    n, d = x.z_a.shape
    dtype = _compute_dtype(x.z_a)
    x.c = x.z_a.new_empty(d, dtype=dtype)
    diagonal = slab = room = tau = None
    if x.normalization is not None:
        x.stats = tuple(x.z_a.new_empty(2, 1, d, dtype=dtype) for _ in range(4))
        x.few_means(out=x.stats[2])
        diagonal = x.c.new_zeros(2, n)
    panels: list[list[Tensor | None]] = [[None] * -(-n // PANEL) for _ in range(2)]
    for columns in x.columns():
        if diagonal is None:
            slab = x.slab(_ALL, columns, out=slab)
            x.c[columns] = (slab[0] * slab[1]).mean(0)
        else:
            slab, tau, room = _standardize(x, columns, diagonal, room)
        for view, x_hat in enumerate(slab):
            for i, start in enumerate(range(0, n, PANEL)):  # rows of the lower triangle
                stop = min(start + PANEL, n)
                of_bulk = None if tau is None else tau[view, :stop]
                product = _matmul_t(x_hat[start:stop], x_hat[:stop], x.z_a.dtype, of_bulk)
                panels[view][i] = _add(panels[view][i], product)
    del slab, room
    k = x.c.new_empty(2, n, n)
    for view, parts in enumerate(panels):
        for panel, start in zip(parts, range(0, n, PANEL), strict=True):
            stop = start + len(panel)
            torch.div(panel, d, out=k[view, start:stop, :stop])
            if start:
                k[view, :start, start:stop] = k[view, start:stop, :start].mT
    if diagonal is not None:
        torch.div(diagonal, d, out=k.diagonal(dim1=1, dim2=2))
    inner = sum(_scalar((k[0, r] * k[1, r]).sum(dtype=torch.float64)) for r in _slabs(n, n)) + bulk.inner(x)
    return _terms_of_gram(x, inner * d**2, lambd, scale), k


def _standardize(
    x: Normalized, columns: slice, diagonal: Tensor, room: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A slab's statistics and c. Returns x_hat = (z - mean) * rstd + shift, (2, N, columns), tau / N for each sample if
    K has bulk, and the room, which the first slab makes; adds what these features make of the ``diagonal``, (2, N).

    Features are centred by the mean of a few samples, and what is left of it is taken off the sums. If that is much,
    these few were not like the others: then it is done again by the mean of all.
    """
    n, d = x.z_a.shape
    width, parts = len(range(d)[columns]), list(_narrow(columns, d, n))
    if room is None:  # one for all: malloc gives several back to the system, whose fresh pages cost more than the work
        room = diagonal.new_empty(n * (2 * width + 3 * len(range(width)[parts[0][1]])))
    slab = x.slab(_ALL, columns) if x.made else _view(room, 2, n, width)
    of_squares = room[2 * n * width :]
    tau, has_bulk = 0.0, bulk.is_left_out(x)
    for here, part in parts:
        x_hat = _cut(slab, part)
        rstd, var, mean, shift = (_cut(stat, here) for stat in x.stats)
        squares = _view(of_squares, 3, n, x_hat.shape[2])
        for again in reversed(range(MEANS)):
            if not x.made:
                x.slab(_ALL, here, less=mean, out=x_hat)
            rest, moments = (sums.div_(n) for sums in sums_of(x_hat, squares))
            if not without_rest(moments, rest, out=var) or x.made or not again:
                break
            mean += rest
        rstd.copy_(x.normalization.rstd(var, n))
        torch.mul(rest, rstd, out=shift).neg_()
        x.c[here] = moments[2, 0].mul_(rstd[0, 0]).mul_(rstd[1, 0])
        torch.addcmul(shift, x_hat, rstd, out=x_hat)
        if has_bulk:
            power = (var * rstd).mul_(rstd)
            tau += power.sum(2)
            diagonal -= torch.addcmul(power, x_hat, x_hat, value=-1, out=squares[:2]).sum(2)
        else:
            diagonal += torch.mul(x_hat, x_hat, out=squares[:2]).sum(2)
    return slab, (tau / (n - 1)).expand(2, n).contiguous() if has_bulk else None, room


def _standardized(x: Normalized, columns: slice, out: Tensor | None = None) -> Tensor:  # [2, N, columns]
    """Some features of A_hat and B_hat, written over ``out``, the last slab, if that has its shape."""
    if x.normalization is None:
        return x.slab(_ALL, columns, out=out)
    rstd, _, mean, shift = (_cut(stat, columns) for stat in x.stats)
    slab = x.slab(_ALL, columns, less=mean, out=out)
    return torch.addcmul(shift, slab, rstd, out=slab)


def input_grad(
    x: Normalized,
    product: Tensor,  # what gram or correlate returned
    route: str,
    weights: Weights,
    needs: tuple[bool, bool],  # which of the two gradients are wanted
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dz_a and dL/dz_b. For view a (b: exchange a and b), with one number per feature for all but A_hat, B_hat, P:

    grad_a = rstd_a * (alpha * P + d * B_hat - kappa_a * m * A_hat),   m = mean_n(A_hat * (alpha * P + d * B_hat))
    """
    alpha, d = weights_of(x, weights)
    views = [view for view in range(2) if needs[view]]
    return (_gram_grad if route == "gram" else torch_direct.input_grad)(x, product, alpha, d, views)


def _gram_grad(
    x: Normalized, product: Tensor, alpha: Tensor | float, d: Tensor, views: list[int]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients, with P_a = K_b A_hat / D, which contains C's diagonal."""
    n, features = x.z_a.shape
    d -= x.c * alpha
    alpha = alpha * (features / n)
    blocks = list(x.columns())
    grads = x.gradients(views, whole=len(blocks) == 1)
    if x.normalization is not None:  # grad = rstd_alpha * P + rstd_d * other + (own_0 + own_1 * mean_n(own * P)) * own
        rstd, var = x.stats[:2]
        rstd_d = rstd * d
        rstd_alpha = rstd * alpha
        own_1 = rstd_alpha * -(kappa := x.normalization.kappa(var, n))
        own_0 = (rstd_d * x.c).mul_(-kappa)
        if bulk.is_left_out(x):
            own_0 += bulk.of_own(x, rstd_alpha)
    slab = own_p = None
    for columns in blocks:
        slab = _standardized(x, columns, out=slab)
        for view in views:
            own, other = slab[view], slab[1 - view]
            p = _matmul_t(product[1 - view], own.T, x.z_a.dtype)
            if x.normalization is None:
                last = (other, _cut(d, columns))
                p.mul_(alpha)
            else:
                own_p = torch.mul(own, p, out=_like(own, own_p))
                p.mul_(_cut(rstd_alpha[view], columns)).addcmul_(other, _cut(rstd_d[view], columns))
                last = (own, torch.addcmul(_cut(own_0[view], columns), _cut(own_1[view], columns), own_p.mean(0)))
            room = grads.room(view, (_ALL, columns), p.dtype)
            p = torch.addcmul(p, *last, out=p if room is None else room)
            grads.put(view, (_ALL, columns), p, room)
            del p  # before the next one is made
        grads.end((_ALL, columns))
    return grads.result()
