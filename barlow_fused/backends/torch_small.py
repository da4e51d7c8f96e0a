"""Small inputs on CPUs: both routes, in few operators.

A call of an operator costs as much as its work here. So both views lie in one tensor, which is kept for the backward
pass, and they are centred by passes over it, which is in a cache: that leaves no rest of a mean that sums and gradients
would have to be corrected for. c is summed by itself: where C_ii is close to 1 the gradient is a small difference, for
which a product's sums are not exact enough. torch_slabs.py and torch_direct.py walk over larger inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import BarlowTwinsTerms
from . import bulk, slabs, torch_direct
from .slabs import (
    _ALL,
    Normalized,
    _by_onednn,
    _compute_dtype,
    _matmul_t,
    _scalar,
    _stack,
    _terms_of_gram,
)

KEEP_ELEMENTS = 2**20  # inputs up to this size, in float32 or float64, keep what is made of them
KEEP_HALVES = 2**17  # those in half precision, of which it takes twice the room
CONSTANT = 1e-10  # a variance from which what is left of a large constant feature is below its tolerance
BULK_FEATURES = 1024  # of which K's bulk is taken off at a time: of more, their sum would be rounded as the bulk is


def is_small(x: Normalized) -> bool:
    """Whether this file computes the loss."""
    return not x.made and keeps(*x.z_a.shape, x.z_a.dtype)


def keeps(n: int, d: int, dtype: torch.dtype) -> bool:
    """Whether inputs of that size keep their views."""
    return n * d <= (KEEP_ELEMENTS if dtype.itemsize >= 4 else KEEP_HALVES)


def empty_stats(z: Tensor, route: str) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of ``stats``: rstd, variance, what is kept of the views; on the direct
    route C0's squares, summed by row and column.
    """
    n, d = z.shape
    shapes = [(2, 1, d), (2, 1, d), (2, n, d)] + ([] if route == "gram" else [(2, 1, d)])
    return [z.new_empty(shape, dtype=_compute_dtype(z)) for shape in shapes]


def _standardise(x: Normalized) -> Tensor:  # [2, N, D]
    """A_hat and B_hat, or the inputs as they are. Sets the statistics and c."""
    if x.normalization is None:
        views = _stack(x.z_a, x.z_b, _ALL, _ALL)
    else:
        n = x.z_a.shape[0]
        views = x.z_a.new_empty(2, *x.z_a.shape, dtype=_compute_dtype(x.z_a))
        for z, view in zip((x.z_a, x.z_b), views.unbind(), strict=True):
            torch.sub(z, z.mean(0, dtype=view.dtype), out=view)
        var = _variance(_centre(views))  # rounding left 1e-7 of the means, and leaves nothing of that
        smallest, largest = map(_scalar, torch.aminmax(var))
        if type(smallest) is float and smallest < CONSTANT:
            var = _variance(_centre(views))
        rstd = x.normalization.rstd(var, n)
        if type(largest) is float and largest == math.inf:
            rstd += var * 0  # NaN, not the 0 of a feature that does not vary
        x.stats = (rstd, var, views.mul_(rstd))
    a, b = views.unbind()
    x.c = (a * b).mean(0)
    return views


def _centre(views: Tensor) -> Tensor:
    # Not sub_(sum, alpha=1 / N), whose product is rounded or not, by where a number lies: constants would not stay.
    return views.sub_(views.mean(1, keepdim=True))


def _variance(views: Tensor) -> Tensor:  # [2, 1, D]
    return (views * views).mean(1, keepdim=True)


# -- the Gram route --


def gram(x: Normalized, lambd: float, scale: float) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and K_a / D and K_b / D less their bulk (bulk.py), stacked, (2, N, N). 4 N^2 D FLOPs."""
    d = x.z_a.shape[1]
    views = _standardise(x)
    squares = views * views
    if bulk.is_left_out(x):
        rstd, var, _ = x.stats
        power = (var * rstd).mul_(rstd)
        squares -= power
        k = _products_less_bulk(views, power)
    else:
        k = _products(views, views)
    k.diagonal(dim1=1, dim2=2).copy_(squares.sum(2))  # a product may round all of its terms to one side
    del squares  # room for what follows
    k /= d
    k_a, k_b = k.double().view(2, -1).unbind()
    inner = _scalar(torch.dot(k_a, k_b)) + bulk.inner(x)
    return _terms_of_gram(x, inner * d**2, lambd, scale), k


def _products(x: Tensor, y: Tensor) -> Tensor:  # [2, M, K], [2, L, K] -> [2, M, L]
    """x @ y.T of both views, by the library that multiplies fastest: with AVX2 that is MKL, of both at once."""
    if not math.isfinite(slabs.ONEDNN_MAX_ROWS) and _by_onednn(x, y):
        return torch.stack([_matmul_t(*pair, x.dtype) for pair in zip(x, y, strict=True)])
    return torch.bmm(x, y.mT)


def _products_less_bulk(views: Tensor, power: Tensor) -> Tensor:  # [2, N, D], [2, 1, D] -> [2, N, N]
    """K less its bulk, but for the diagonal. ``power`` is what each feature has of tau."""
    k, n = None, views.shape[1]
    for part, of_part in zip(views.split(BULK_FEATURES, 2), power.split(BULK_FEATURES, 2), strict=True):
        product = torch.baddbmm(of_part.sum(2, keepdim=True).div_(n - 1), part, part.mT)
        k = product if k is None else k.add_(product)
    return k


def gram_grad(
    x: Normalized, k: Tensor, alpha: Tensor | float, d: Tensor, views: list[int]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients (torch_slabs.input_grad), with P_a = K_b A_hat / D, which contains C's diagonal."""
    n, features = x.z_a.shape
    d -= x.c * alpha
    alpha = alpha * (features / n)
    if x.normalization is None:
        x_hat = _stack(x.z_a, x.z_b, _ALL, _ALL)
        p = _products(k.flip(0), x_hat.mT).mul_(alpha)
        of_other, of_own = (d, d), (None, None)
    else:
        rstd, var, x_hat = x.stats
        p = _products(k.flip(0), x_hat.mT)
        of_p, of_other = rstd * alpha, rstd * d
        of_own = (x_hat * p).mean(1, keepdim=True).mul_(of_p).addcmul_(of_other, x.c)
        of_own *= -x.normalization.kappa(var, n)
        if bulk.is_left_out(x):
            of_own += bulk.of_own(x, of_p)
        p *= of_p
        of_other, of_own = of_other.unbind(), of_own.unbind()
    p, x_hat = p.unbind(), x_hat.unbind()
    grads: list[Tensor | None] = [None, None]
    for view in views:
        grad = torch.addcmul(p[view], x_hat[1 - view], of_other[view])
        if of_own[view] is not None:
            grad.addcmul_(x_hat[view], of_own[view])
        grads[view] = grad.to(x.z_a.dtype)
    return grads[0], grads[1]


# -- the direct route --


def correlate(x: Normalized, lambd: float, scale: float) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and C with its diagonal set to 0, (D, D). 2 N D^2 FLOPs."""
    a, b = _standardise(x).unbind()
    c = torch.mm(a.T, b).div_(x.z_a.shape[0])
    terms, squares = torch_direct.terms_of(x, c, lambd, scale)
    if x.normalization is not None:
        x.stats += (squares.view(2, 1, -1),)
    return terms, c


def direct_grad(
    x: Normalized, c: Tensor, alpha: Tensor | float, d: Tensor, views: list[int]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients (torch_slabs.input_grad), 2 N D^2 FLOPs each. rstd is in the (D, D) matrix, and mean_n(A_hat * P) =
    sum_j C_ij C_ij.
    """
    g = c * alpha
    g.diagonal().copy_(d)
    if x.normalization is None:
        x_hat, of_own, of_p = _stack(x.z_a, x.z_b, _ALL, _ALL), (None, None), (None, None)
    else:
        rstd, var, x_hat, squares = x.stats
        m = (squares * alpha).addcmul_(d, x.c)
        of_own = m.mul_(rstd).mul_(-x.normalization.kappa(var, x.z_a.shape[0]))
        of_own, of_p = of_own.unbind(), rstd.unbind()
    x_hat = x_hat.unbind()
    grads: list[Tensor | None] = [None, None]
    for view in views:
        own, other, factor = x_hat[view], x_hat[1 - view], of_own[view]
        right = g if view else g.T
        if factor is not None:
            right = right * of_p[view]
        if factor is None or _by_onednn(other, right):
            grad = _matmul_t(other, right.T, x.z_a.dtype)
            grad = grad if factor is None else grad.addcmul_(own, factor)
        else:  # the product is added to what is there, which costs it nothing
            grad = (own * factor).addmm_(other, right)
        grads[view] = grad.to(x.z_a.dtype)
    return grads[0], grads[1]
