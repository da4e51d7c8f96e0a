"""The direct route for CPUs: C, and its gradient, by three products and as few passes over the inputs as possible.

Inputs are walked over in slabs of rows; torch_small.py keeps what is small. Views are centred but never scaled: what is
one number for each feature goes into the (D, D) matrices. With A and B centred, r their features' rstd, and C0 the
correlation matrix with its diagonal set to 0,

    C0     = r_a (A^T B) r_b / N                         off the diagonal
    grad_a = B G^T + A * of_a                            G = r_a (alpha C0 + d I) r_b,   of_a = -kappa_a r_a^2 m_a
    grad_b = A G   + B * of_b                            m_a,i = alpha sum_j C0_ij^2 + d_i C_ii

where alpha, d and m are those of ``torch_slabs.input_grad``. A product is added to what is in its place already, so the
gradient takes one elementwise pass a view, where batch norm's takes several.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import BarlowTwinsTerms
from .slabs import (
    _ALL,
    MEANS,
    Normalized,
    _by_onednn,
    _compute_dtype,
    _matmul_t,
    _narrow,
    _scalar,
    _slabs,
    _terms,
    _view,
    sums_of,
    without_rest,
)


def correlate(x: Normalized, lambd: float, scale: float) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and C with its diagonal set to 0, (D, D). 2 N D^2 FLOPs, in one pass over slabs of rows.

    Rows are first centred by the mean of a few of them, and what is left of the mean is taken off the sums. If that is
    much, these few were not like the others: then it is done again by the mean of all.
    """
    n = x.z_a.shape[0]
    if x.normalization is None:
        c, moments, _ = _sums(x, None)
        x.c = moments[2, 0].clone()  # torch.compile wants results that begin where their memory does
        return terms_of(x, c.mul_(1 / n), lambd, scale)[0], c
    shift = x.few_means(out=x.z_a.new_empty(2, 1, x.z_a.shape[1], dtype=_compute_dtype(x.z_a)))
    for again in reversed(range(MEANS)):
        c = None  # room for the next
        c, moments, rest = _sums(x, shift)
        if not without_rest(moments, rest, out=moments[:2]) or x.made or not again:
            break
        shift += rest
    c.addr_(rest[0, 0], rest[1, 0], alpha=-n)
    mean = shift + rest  # rounded
    rest = rest - (mean - shift)
    var, cross = moments[:2], moments[2, 0]
    rstd = x.normalization.rstd(var, n)
    rstd_a, rstd_b = rstd.squeeze(1).unbind()
    x.c = (cross * rstd_a).mul_(rstd_b)
    terms, squares = terms_of(x, c.mul_((rstd_a / n)[:, None]).mul_(rstd_b), lambd, scale)
    x.stats = (rstd, var, mean, rest, squares)
    return terms, c


def empty_stats(z: Tensor) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of ``stats``: rstd; variance; the mean, rounded, and what is left of it;
    C0's squares, summed by row and column.
    """
    d = z.shape[1]
    return [z.new_empty(shape, dtype=_compute_dtype(z)) for shape in [(2, 1, d)] * 4 + [(2, d)]]


def _sums(x: Normalized, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of A and B, the views less ``shift``: A^T B; means of a a, b b and a b, [3, 1, D]; means, [2, 1, D].

    The diagonal a b is summed by itself: where C_ii is close to 1 the gradient is a small difference, for which the
    product's sums over N samples are not exact enough.
    """
    n, d = x.z_a.shape
    product = rest = moments = room = None
    for rows in _slabs(n, d):
        height, parts = len(range(n)[rows]), list(_narrow(rows, n, d))
        squares = 3 * d * len(range(height)[parts[0][1]])
        if room is None:  # one for all: malloc gives several back to the system
            room = x.z_a.new_empty(squares + (0 if x.made else 2 * d * height), dtype=_compute_dtype(x.z_a))
        slab = x.slab(rows, _ALL) if x.made else _view(room[squares:], 2, height, d)
        for here, part in parts:
            views = slab[:, part]
            if not x.made:
                x.slab(here, _ALL, less=shift, out=views)
            of_part = sums_of(views, _view(room, 3, views.shape[1], d))
            rest, moments = _add(rest, of_part[0]), _add(moments, of_part[1])
        product = _add_product(product, slab)
    return product, moments.div_(n), rest.div_(n)


def terms_of(x: Normalized, c: Tensor, lambd: float, scale: float) -> tuple[BarlowTwinsTerms, Tensor]:  # [], [2, D]
    """The terms from C, whose diagonal is set to 0, and the sums of its rows' and its columns' squares."""
    square = c.fill_diagonal_(0) * c
    of_rows = square.sum(1)
    off_diag = _scalar(of_rows.sum(dtype=torch.float64))
    return _terms(x.c.double(), off_diag, lambd, scale), torch.stack((of_rows, square.sum(0)))


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _add_product(product: Tensor | None, slab: Tensor) -> Tensor:  # [D, D], [2, N, D] -> [D, D]
    """product + A^T B; not by oneDNN, which is slower where the first factor is transposed."""
    a, b = slab.unbind()
    return torch.mm(a.T, b) if product is None else torch.addmm(product, a.T, b, out=product)


def input_grad(
    x: Normalized, c: Tensor, alpha: Tensor | float, d: Tensor, views: list[int]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by the formulas above, of the views that ``views`` names; 2 N D^2 FLOPs each."""
    n, features = x.z_a.shape
    blocks = list(_slabs(n, features))
    mean, constant = None, [None, None]  # what the rounded means make of the gradient, to be taken off
    if x.normalization is None:
        g, of_own = c * alpha, None
        g.diagonal().copy_(d)
    else:
        rstd, var, mean, rest, squares = x.stats
        rstd_a, rstd_b = rstd.squeeze(1).unbind()
        g = (c * (rstd_a * alpha)[:, None]).mul_(rstd_b)
        g.diagonal().copy_((rstd_a * d).mul_(rstd_b))
        of_own = (rstd * rstd).mul_(-x.normalization.kappa(var, n))
        of_own *= (squares * alpha).add_(d * x.c)[:, None]
        for view in views:
            of_rest = torch.addmm(rest[view] * of_own[view], rest[1 - view], g if view else g.T)
            constant[view] = of_rest.neg_()[0]
    grads = x.gradients(views, whole=len(blocks) == 1)
    slab = None
    for rows in blocks:
        slab = x.slab(rows, _ALL, less=mean, out=slab)
        added = of_own is not None and not _by_onednn(slab[0], g)
        for view in views:
            own, other, right = slab[view], slab[1 - view], g if view else g.T
            out = grads.room(view, (rows, _ALL), own.dtype)
            if added:  # the product is added to what is there, which costs it nothing
                p = torch.addcmul(constant[view], own, of_own[view], out=out)
                p.addmm_(other, right)
            else:
                p = _matmul_t(other, right.T, x.z_a.dtype, constant[view])
                if of_own is not None:
                    p = torch.addcmul(p, own, of_own[view], out=p if out is None else out)
                elif out is not None:
                    p = out.copy_(p)
            grads.put(view, (rows, _ALL), p, out)
            del p  # before the next one is made
        grads.end((rows, _ALL))
    return grads.result()
