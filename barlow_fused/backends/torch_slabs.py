"""The four operations for CPUs, by PyTorch's operators: the Gram route. torch_direct.py has the direct one.

Standardised features are not stored, unless they are small. Each operation walks over slabs of features, standardises
a slab, multiplies it and drops it, so the inputs are the only (N, D) arrays that travel from memory, and the extra
memory is the product plus a few slabs.

Means are removed twice: the first mean is rounded to the inputs' precision, which leaves an error of |mean| * 6e-8 in
float32; the mean of what is left removes that, so that features with |mean|/std = 1000 lose nothing.
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
    BULK_PART,
    KEEP_ELEMENTS,
    NARROW_SLAB,
    ONEDNN_MIN_FLOPS,
    Normalized,
    _compute_dtype,
    _cut,
    _like,
    _matmul_t,
    _scalar,
    _slabs,
    _stack,
    _terms,
)
from .torch_direct import correlate

__all__ = ["Normalized", "correlate", "empty_saved", "gram", "input_grad", "normalize"]

FEW_SAMPLES = 128  # below this the sums over slabs of K, which is small then, are kept in float64
BULK_RATIO = 32  # D / N from which K's bulk is taken out (``_bulk``)
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
    return saved + ([c.new_empty(2, n, d)] if n * d <= KEEP_ELEMENTS else [c.new_empty(2, 1, d) for _ in range(2)])


def gram(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and K_a / D and K_b / D less the part that ``_bulk`` names, stacked, (2, N, N). 2 to 4 N^2 D FLOPs."""
    n, d = x.z_a.shape
    _standardize(x)
    bulk = _bulk(x)
    if n * d <= KEEP_ELEMENTS and not bulk:
        x_hat = _standardized(x, _ALL)
        k = torch.bmm(x_hat, x_hat.mT)
        return _terms(x, _off_diag(x, k.prod(0).sum(dtype=torch.float64)), lambd, scale), k.div_(d)
    k = x.c.new_zeros(2, n, n, dtype=torch.float64 if n < FEW_SAMPLES else x.c.dtype)
    diagonal = k.diagonal(dim1=1, dim2=2)  # (2, N)
    tau = iter(bulk)
    slab = None
    for s in _slabs(d, n):
        slab = _standardized(x, s, out=slab)
        for x_hat in slab.split(BULK_PART if bulk else d, dim=2):
            if 2 * n * n * x_hat.shape[2] <= ONEDNN_MIN_FLOPS:
                k += torch.bmm(x_hat, x_hat.mT)
            else:  # oneDNN takes seconds for a part of a slab, whose rows are apart
                for k_view, x_view in zip(k, x_hat.contiguous(), strict=True):
                    for start in range(0, n, PANEL):  # rows of the lower triangle
                        stop = min(start + PANEL, n)
                        k_view[start:stop, :stop] += _matmul_t(x_view[start:stop], x_view[:stop], x.z_a.dtype)
            if bulk:
                diagonal -= next(tau)
    for start in range(PANEL, n, PANEL):  # mirror it
        stop = min(start + PANEL, n)
        k[:, :start, start:stop] = k[:, start:stop, :start].mT
    inner = sum((k[0, r] * k[1, r]).sum(dtype=torch.float64) for r in _slabs(n, n))
    if bulk:  # <K_a, K_b>, from K - tau I
        tau = torch.stack(bulk).sum(0, dtype=torch.float64)[:, 0]  # (2,)
        inner = inner + torch.dot(diagonal.sum(1, dtype=torch.float64), tau.flip(0)) + n * tau.prod()
        k += (tau / n).to(k.dtype)[:, None, None]
    return _terms(x, _off_diag(x, inner), lambd, scale), k.div_(d).to(x.c.dtype)


def _standardize(x: Normalized) -> None:
    """Statistics of every feature of both views, and c = diag(C), in one pass over the inputs.

    ``stats`` are rstd, variance, mean and shift, x_hat = (z - mean) * rstd + shift; or rstd, variance and x_hat.
    """
    z_a, z_b, normalization = x.z_a, x.z_b, x.normalization
    n, d = z_a.shape
    dtype = _compute_dtype(z_a)
    x.c = c = z_a.new_empty(d, dtype=dtype)
    if normalization is None:
        for s in _slabs(d, n, NARROW_SLAB):
            c[s] = (z_a[:, s].to(dtype) * z_b[:, s]).mean(0)
        return
    mean, shift, var = (z_a.new_empty(2, 1, d, dtype=dtype) for _ in range(3))
    slab = square = None
    for s in _slabs(d, n, NARROW_SLAB):
        here, rest = _cut(mean, s), _cut(shift, s)
        for view, z in enumerate((z_a, z_b)):
            torch.mean(z[:, s], 0, dtype=dtype, out=here[view, 0])
        slab = _stack(z_a, z_b, _ALL, s, less=here, out=slab)
        slab -= torch.mean(slab, 1, keepdim=True, out=rest)  # what rounding left of the mean
        square = torch.mul(slab, slab, out=_like(slab, square))
        torch.mean(square, 1, keepdim=True, out=_cut(var, s))
        torch.mean(torch.mul(slab[0], slab[1], out=square[0]), 0, out=_cut(c, s))
    rstd = normalization.rstd(var, n)
    c *= rstd.prod(0)[0]
    kept = (slab.mul_(rstd),) if n * d <= KEEP_ELEMENTS else (mean, shift.mul_(rstd).neg_())
    x.stats = (rstd, var, *kept)


def _standardized(x: Normalized, columns: slice, out: Tensor | None = None) -> Tensor:  # [2, N, columns]
    """Some features of A_hat and B_hat, written over ``out``, the last slab, if that has its shape."""
    if x.kept is not None:
        return x.kept
    if x.normalization is None:
        return _stack(x.z_a, x.z_b, _ALL, columns, out=out)
    rstd, _, mean, shift = (_cut(stat, columns) for stat in x.stats)
    slab = _stack(x.z_a, x.z_b, _ALL, columns, less=mean, out=out)
    return torch.addcmul(shift, slab, rstd, out=slab)


def _bulk(x: Normalized) -> list[Tensor]:
    """Where D is much larger than N: tau, how much K has of I - 1 1^T / N; (2, 1) for each BULK_PART features.

    Random directions in D dimensions are orthogonal, so K is close to D (I - 1 1^T / N), and K A_hat to D A_hat, which
    the normalisation's gradient removes. float32 would round the little that remains of it to the precision of what is
    removed (gradient error 7e-6 at N=32 D=65536). So this part is taken out of K while it is summed, and what the
    normalisation leaves of it is added to the gradient in closed form.
    """
    n, d = x.z_a.shape
    if x.normalization is None or d < BULK_RATIO * n:
        return []
    rstd, var = x.stats[:2]
    power = (var * rstd * rstd).mul_(n / (n - 1))
    return [part.sum(2) for s in _slabs(d, n) for part in _cut(power, s).split(BULK_PART, dim=2)]


def _off_diag(x: Normalized, inner: Tensor) -> Tensor | float:
    """||C||^2 - sum_i C_ii^2, from <K_a, K_b>."""
    c = x.c.double()
    off_diag = _scalar(inner) / x.z_a.shape[0] ** 2 - _scalar(torch.dot(c, c))
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
    blocks = list(_slabs(features, n))
    grads: list[Tensor | None] = [None, None]
    if len(blocks) > 1:
        for view in views:
            grads[view] = torch.empty_like((x.z_a, x.z_b)[view])
    if x.normalization is not None:  # grad = rstd_alpha * P + rstd_d * other + (own_0 + own_1 * mean_n(own * P)) * own
        rstd, var = x.stats[:2]
        rstd_d = rstd * d
        rstd_alpha = rstd * alpha
        own_1 = rstd_alpha * -(kappa := x.normalization.kappa(var, n))
        own_0 = (rstd_d * x.c).mul_(-kappa)
        if bulk := _bulk(x):
            tau = torch.stack(bulk).sum(0, dtype=torch.float64).to(rstd.dtype).flip(0)[..., None] / features
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
            if len(blocks) == 1:
                grads[view] = p.addcmul_(*last).to(x.z_a.dtype)
            elif p.dtype == x.z_a.dtype:
                torch.addcmul(p, *last, out=grads[view][:, columns])
            else:
                grads[view][:, columns] = p.addcmul_(*last)
            del p  # before the next one is made
    return grads[0], grads[1]
