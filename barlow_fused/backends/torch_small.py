"""Small inputs on CPUs: both routes, in few operators.

A call of an operator costs as much as its work here. So both views lie in one tensor, which is kept for the backward
pass, and they are centred by passes over it, which is in a cache, again where a mean is far from 0: that leaves no rest
of a mean that sums and gradients would have to be corrected for. c is summed by itself: where C_ii is close to 1 the
gradient is a small difference, for which a product's sums are not exact enough. torch_slabs.py and torch_direct.py walk
over larger inputs.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..normalization import Normalization
from ..reference import BarlowTwinsTerms
from . import bulk, slabs, torch_direct
from .operations import Spec, Weights, tensor
from .slabs import (
    _ALL,
    Normalized,
    _by_onednn,
    _compute_dtype,
    _matmul_t,
    _scalar,
    _stack,
    _terms_of_gram,
    weights_of,
)

KEEP_ELEMENTS = 2**20  # inputs up to this size, in float32 or float64, keep what is made of them
KEEP_HALVES = 2**17  # those in half precision, of which it takes twice the room
FAR = 4  # deviations that a mean may be from 0: rounding leaves 1e-7 of it, and of a larger one that is taken off again
CONSTANT = 1e-10  # a variance from which what is left of a large constant feature is below its tolerance
BULK_FEATURES = 1024  # of which K's bulk is taken off at a time: of more, their sum would be rounded as the bulk is


def keeps(n: int, d: int, dtype: torch.dtype) -> bool:
    """Whether inputs of that size keep their views."""
    return n * d <= (KEEP_ELEMENTS if dtype.itemsize >= 4 else KEEP_HALVES)


def forward(
    z_a: Tensor, z_b: Tensor, spec: Spec, need_grad: bool, every_term: bool
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The terms, and what the backward pass needs (nothing where no gradient is wanted)."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return forward(z_a, z_b, spec, need_grad, every_term)
    x = Normalized(z_a, z_b, spec.normalization)
    terms, product = (gram if spec.route == "gram" else correlate)(x, spec.lambd, spec.scale)
    saved = [product, x.c, *x.stats] if need_grad else []
    if every_term:
        return tuple([tensor(term, z_a) for term in terms]), saved
    return (tensor(terms.loss, z_a),), saved


def backward(
    z_a: Tensor,
    z_b: Tensor,
    saved: list[Tensor],
    spec: Spec,
    g_terms: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients with respect to z_a and z_b; None in place of one that is not needed."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return backward(z_a, z_b, saved, spec, g_terms, needs)
    product, c, *stats = saved
    x = Normalized(z_a, z_b, spec.normalization, c, stats)
    alpha, d = weights_of(x, Weights(*g_terms, spec.lambd, spec.scale))
    return (gram_grad if spec.route == "gram" else direct_grad)(x, product, alpha, d, needs)


def empty_saved(z_a: Tensor, route: str, normalization: Normalization | None) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of what ``forward`` saves: K or C, c, rstd, variance, what is kept of the
    views; on the direct route C0's squares, summed by row and column.
    """
    n, d = z_a.shape
    shapes = [(2, n, n) if route == "gram" else (d, d), (d,)]
    if normalization is not None:
        shapes += [(2, 1, d), (2, 1, d), (2, n, d)] + ([] if route == "gram" else [(2, 1, d)])
    return [z_a.new_empty(shape, dtype=_compute_dtype(z_a)) for shape in shapes]


def _standardise(x: Normalized) -> Tensor:  # [2, N, D]
    """A_hat and B_hat, or the inputs as they are. Sets the statistics and c."""
    if x.normalization is None:
        views = _stack(x.z_a, x.z_b, _ALL, _ALL)
        count = views.new_full((), len(x.z_a))
    else:
        n = x.z_a.shape[0]
        views = x.z_a.new_empty(2, *x.z_a.shape, dtype=_compute_dtype(x.z_a))
        if type(views) is Tensor:  # with data
            _let_malloc_keep(2 * views.nbytes)
        means = views.new_empty(2, 1, views.shape[2])
        count = views.new_full((), n)  # a number that an operator takes is made a tensor each time
        for z, mean, view in zip((x.z_a, x.z_b), means.unbind(), views.unbind(), strict=True):
            torch.sum(z, 0, keepdim=True, dtype=mean.dtype, out=mean)
            torch.sub(z, mean.div_(count), out=view)
        var = _variance(views, count)
        least, most = map(_scalar, torch.aminmax(means.mul_(means).sub_(var, alpha=FAR**2)))
        if type(most) is float and not most <= 0:  # a mean is far from 0, or NaN
            var = _variance(_centre(views, count), count)
            if _scalar(var.min()) < CONSTANT:
                var = _variance(_centre(views, count), count)
        rstd = x.normalization.rstd(var, n)
        if type(least) is float and not least > -math.inf:
            rstd += var * 0  # NaN, not the 0 of a feature that does not vary
        x.stats = (rstd, var, views.mul_(rstd))
    x.c = torch.linalg.vecdot(*views.unbind(), dim=0).div_(count)
    return views


@functools.lru_cache(maxsize=64)
def _let_malloc_keep(size: int) -> None:
    """glibc gives free memory back to the system beyond twice the largest block that was ever freed. A call frees three
    times its views; to fault their pages in again takes as long as all its work. So such a block, freed untouched.
    """
    bytes(size)


def _centre(views: Tensor, count: Tensor) -> Tensor:
    # Not sub_(sum, alpha=1 / N), whose product is rounded or not, by where a number lies: constants would not stay.
    return views.sub_(views.sum(1, keepdim=True).div_(count))


def _variance(views: Tensor, count: Tensor) -> Tensor:  # [2, 1, D]
    return (views * views).sum(1, keepdim=True).div_(count)


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
        k = _products_less_bulk(views, power).div_(d)
    else:
        k = _products(views, views, 1 / d)
    k.diagonal(dim1=1, dim2=2).copy_(squares.mean(2))  # a product may round all of its terms to one side
    del squares  # room for what follows
    inner = _scalar(torch.linalg.vecdot(*k.unbind()).sum(dtype=torch.float64)) + bulk.inner(x)
    return _terms_of_gram(x, inner * d**2, lambd, scale), k


def _times(x: Tensor, alpha: Tensor | float) -> tuple[Tensor, float]:
    """alpha x, as a tensor and a number to multiply it by, which operators do at no cost. While a call is traced alpha
    is a tensor without a number.
    """
    return (x * alpha, 1.0) if isinstance(alpha, Tensor) else (x, alpha)


def _products(x: Tensor, y: Tensor, alpha: float) -> Tensor:  # [2, M, K], [2, L, K] -> [2, M, L]
    """alpha x @ y.T of both views, by the library that multiplies fastest: with AVX2 that is MKL, of both at once."""
    if not math.isfinite(slabs.ONEDNN_MAX_ROWS) and _by_onednn(x, y):
        return torch.stack([_matmul_t(*pair, x.dtype) for pair in zip(x, y, strict=True)]).mul_(alpha)
    return x.new_empty(2, x.shape[1], y.shape[1]).baddbmm_(x, y.mT, beta=0, alpha=alpha)


def _products_less_bulk(views: Tensor, power: Tensor) -> Tensor:  # [2, N, D], [2, 1, D] -> [2, N, N]
    """K less its bulk, but for the diagonal. ``power`` is what each feature has of tau."""
    k, n = None, views.shape[1]
    for part, of_part in zip(views.split(BULK_FEATURES, 2), power.split(BULK_FEATURES, 2), strict=True):
        product = torch.baddbmm(of_part.sum(2, keepdim=True).div_(n - 1), part, part.mT)
        k = product if k is None else k.add_(product)
    return k


def gram_grad(
    x: Normalized, k: Tensor, alpha: Tensor | float, d: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients (torch_slabs.input_grad), with P_a = K_b A_hat / D, which contains C's diagonal."""
    (n, features), dtype = x.z_a.shape, x.z_a.dtype
    c, number = _times(x.c, alpha)
    d.sub_(c, alpha=number)
    alpha = alpha * (features / n)
    x_hat = _stack(x.z_a, x.z_b, _ALL, _ALL) if x.normalization is None else x.stats[2]
    k, number = _times(k.roll(1, 0), alpha)
    p = _products(k, x_hat.mT, number)
    del k  # room for what follows
    if x.normalization is None:
        of_other, of_own, factor = (d, d), (None, None), 0.0
    else:
        rstd, var = x.stats[:2]
        own = torch.add(d * x.c, (x_hat * p).sum(1, keepdim=True), alpha=1 / n).mul_(rstd)
        factor = -x.normalization.kappa(var, n)
        if isinstance(factor, Tensor) or bulk.is_left_out(x):
            own, factor = own.mul_(factor), 1.0
        if bulk.is_left_out(x):
            own += bulk.of_own(x, rstd * alpha)
        p *= rstd
        of_other, of_own = (rstd * d).unbind(), own.unbind()
    p, x_hat = p.unbind(), x_hat.unbind()
    grads: list[Tensor | None] = [None, None]
    for view in (0, 1):
        if not needs[view]:
            continue
        grad = torch.addcmul(p[view], x_hat[1 - view], of_other[view])
        if of_own[view] is not None:
            grad.addcmul_(x_hat[view], of_own[view], value=factor)
        grads[view] = grad if grad.dtype is dtype else grad.to(dtype)
    return grads[0], grads[1]


# -- the direct route --


def correlate(x: Normalized, lambd: float, scale: float) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and C with its diagonal set to 0, (D, D). 2 N D^2 FLOPs."""
    a, b = _standardise(x).unbind()
    c = a.new_empty(a.shape[1], a.shape[1]).addmm_(a.T, b, beta=0, alpha=1 / len(a))
    terms, squares = torch_direct.terms_of(x, c, lambd, scale)
    if x.normalization is not None:
        x.stats += (squares.view(2, 1, -1),)
    return terms, c


def direct_grad(
    x: Normalized, c: Tensor, alpha: Tensor | float, d: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients (torch_slabs.input_grad), 2 N D^2 FLOPs each. rstd is in the (D, D) matrix, and mean_n(A_hat * P) =
    sum_j C_ij C_ij.
    """
    dtype = x.z_a.dtype
    g = c * alpha
    g.diagonal().copy_(d)
    if x.normalization is None:
        x_hat = _stack(x.z_a, x.z_b, _ALL, _ALL).unbind()
    else:
        rstd, var, x_hat, squares = x.stats
        squares, number = _times(squares, alpha)
        of_own = torch.add(d * x.c, squares, alpha=number).mul_(rstd)
        factor = -x.normalization.kappa(var, x.z_a.shape[0])
        if isinstance(factor, Tensor):
            of_own, factor = of_own.mul_(factor), 1.0
        of_own, of_p, x_hat = of_own.unbind(), rstd.unbind(), x_hat.unbind()
    grads: list[Tensor | None] = [None, None]
    for view in (0, 1):
        if not needs[view]:
            continue
        own, other = x_hat[view], x_hat[1 - view]
        right = g if view else g.T
        if x.normalization is None:
            grad = _matmul_t(other, right.T, dtype)
        elif _by_onednn(other, right):
            grad = _matmul_t(other, (right * of_p[view]).T, dtype).addcmul_(own, of_own[view], value=factor)
        else:  # the product is added to what is there, which costs it nothing
            grad = (own * of_own[view]).addmm_(other, right * of_p[view], beta=factor)
        grads[view] = grad if grad.dtype is dtype else grad.to(dtype)
    return grads[0], grads[1]
