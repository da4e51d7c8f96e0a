"""The four operations for CPUs, by PyTorch's operators: the Gram route. torch_direct.py has the direct one.

Standardised features are not stored, unless they are small. Each operation walks over slabs of features, standardises
a slab, multiplies it and drops it, so the inputs are the only (N, D) arrays that travel from memory, and the extra
memory is the product plus a few slabs.

Means are removed twice: the first mean is rounded to the inputs' precision, and that of a few samples; the mean of what
is left removes what it leaves, so that features with |mean|/std = 1000 lose nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..normalization import Normalization
from ..reference import BarlowTwinsTerms
from . import torch_direct
from .operations import Weights
from .slabs import (
    _ALL,
    KEEP_ELEMENTS,
    MEANS,
    Normalized,
    _compute_dtype,
    _cut,
    _like,
    _matmul_t,
    _narrow,
    _scalar,
    _slabs,
    _stack,
    _terms,
    _view,
    sums_of,
    without_rest,
)
from .torch_direct import _add, correlate

__all__ = ["Normalized", "correlate", "empty_saved", "gram", "input_grad", "normalize"]

BULK_RATIO = 32  # D / N from which K's bulk is left out (``_bulk``)
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
    saved += [c.new_empty(2, 1, d) for _ in range(2)]
    if route == "direct":
        return saved + torch_direct.empty_stats(z_a)
    return saved + ([c.new_empty(2, n, d)] if _is_small(z_a) else [c.new_empty(2, 1, d) for _ in range(2)])


def gram(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and K_a / D and K_b / D less their bulk (``_bulk``), stacked, (2, N, N). 2 to 4 N^2 D FLOPs.

    In one walk over the inputs: a slab is standardised, multiplied with itself, and dropped.
    """
    if not x.made and _is_small(x.z_a):
        return _gram_of_small(x, lambd, scale)
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
    bulk: Tensor | float = 0.0
    if diagonal is not None:
        torch.div(diagonal, d, out=k.diagonal(dim1=1, dim2=2))
        bulk = (n - 1) * _scalar(_bulk(x).prod()) if _has_bulk(x) else 0.0
    inner = sum(_scalar((k[0, r] * k[1, r]).sum(dtype=torch.float64)) for r in _slabs(n, n)) + bulk
    return _terms(x, _off_diag(x, inner * d**2), lambd, scale), k


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
    tau, has_bulk = 0.0, _has_bulk(x)
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


def _is_small(z: Tensor) -> bool:
    """Whether what is made of the inputs is kept. Calls cost more than bytes there; but not where K is mostly bulk."""
    n, d = z.shape
    return n * d <= KEEP_ELEMENTS and d < BULK_RATIO * n


def _has_bulk(x: Normalized) -> bool:
    """Whether K's bulk is left out. Where features are few, K may be anything, and far from its bulk."""
    n, d = x.z_a.shape
    return x.normalization is not None and d >= BULK_RATIO * n


def _gram_of_small(x: Normalized, lambd: float, scale: float) -> tuple[BarlowTwinsTerms, Tensor]:
    """The same in few calls, with K_a / D and K_b / D, bulk and all, and x_hat kept."""
    n, d = x.z_a.shape
    if x.normalization is None:
        x_hat = _stack(x.z_a, x.z_b, _ALL, _ALL)
        x.c = (x_hat[0] * x_hat[1]).mean(0)
    else:
        mean = torch.stack([z.mean(0, keepdim=True, dtype=_compute_dtype(z)) for z in (x.z_a, x.z_b)])
        x_hat = _stack(x.z_a, x.z_b, _ALL, _ALL, less=mean)
        x_hat -= x_hat.mean(1, keepdim=True)  # what rounding left of the mean
        var = x_hat.square().mean(1, keepdim=True)
        rstd = x.normalization.rstd(var, n)
        x.c = (x_hat[0] * x_hat[1]).mean(0).mul_(rstd.prod(0)[0])
        x.stats = (rstd, var, x_hat.mul_(rstd))
    k = torch.bmm(x_hat, x_hat.mT)
    k.diagonal(dim1=1, dim2=2).copy_(x_hat.square().sum(2))  # a product may round all of its terms to one side
    return _terms(x, _off_diag(x, _scalar(k.prod(0).sum(dtype=torch.float64))), lambd, scale), k.div_(d)


def _standardized(x: Normalized, columns: slice, out: Tensor | None = None) -> Tensor:  # [2, N, columns]
    """Some features of A_hat and B_hat, written over ``out``, the last slab, if that has its shape."""
    if x.kept is not None:
        return x.kept
    if x.normalization is None:
        return x.slab(_ALL, columns, out=out)
    rstd, _, mean, shift = (_cut(stat, columns) for stat in x.stats)
    slab = x.slab(_ALL, columns, less=mean, out=out)
    return torch.addcmul(shift, slab, rstd, out=slab)


def _bulk(x: Normalized) -> Tensor:  # [2] float64
    """tau / D, where tau (I - 1 1^T / N) is what K has of it, and E is the rest: K of independent features.

    Where D is much larger than N, K is close to D (I - 1 1^T / N), and K A_hat to D A_hat, which the normalisation's
    gradient removes: float32 would round the little that remains of it to the precision of what is removed (gradient
    error 7e-6 at N=32 D=65536). So E is summed, the diagonal by itself, as x_hat^2 less its mean, and what the
    normalisation leaves of the bulk is added to the gradient in closed form. E has no trace and 1^T E = 0, so
    <K_a, K_b> = <E_a, E_b> + (N - 1) tau_a tau_b.
    """
    n, d = x.z_a.shape
    rstd, var = x.stats[:2]
    return (var * rstd).mul_(rstd).sum((1, 2), dtype=torch.float64).mul_(n / (n - 1) / d)


def _off_diag(x: Normalized, inner: Tensor | float) -> Tensor | float:
    """||C||^2 - sum_i C_ii^2, from <K_a, K_b>."""
    c = x.c.double()
    off_diag = inner / x.z_a.shape[0] ** 2 - _scalar(torch.dot(c, c))
    return off_diag.clamp_min(0) if isinstance(off_diag, Tensor) else max(off_diag, 0.0)  # NaN stays NaN in both


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
    w_on, w_off = Weights(*(None if g is None else _scalar(g) for g in weights[:3]), *weights[3:]).of_sums()
    alpha = w_off * (2 / x.z_a.shape[0])
    d = (x.c - 1).mul_(w_on * (2 / x.z_a.shape[0]))
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
        if _has_bulk(x):
            tau = _bulk(x).flip(0).to(rstd.dtype)[:, None, None]  # of the other view
            own_0 += rstd_alpha * tau * x.normalization.remainder(rstd)
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
