"""The four operations for CPUs, by PyTorch's operators: in slabs that the caches hold.

Two ideas make it fast:

* **Slabs.** Standardised features are never stored. Each operation walks over slabs of the inputs that fit the caches,
  standardises a slab, multiplies it and drops it, so the inputs are the only (N, D) arrays that travel from memory, and
  the extra memory is the product plus a few slabs.
* **The faster matrix product.** ``torch.mm`` in float32 goes to MKL, which uses AVX2 on AMD processors; where a CPU has
  AVX-512, oneDNN generates code for it and is twice as fast, at the same float32 accuracy. With AVX2 alone oneDNN is
  the faster for few rows, and MKL, by a third, for many (benchmarks/NOTES.md).

Means are removed twice: the first mean is rounded to the inputs' precision, which leaves an error of |mean| * 6e-8 in
float32; the mean of what is left removes that, so that features with |mean|/std = 1000 lose nothing.

Both routes end in the same gradient, because both products are the same matrix work: P_a = B_hat C^T is K_b A_hat / N
in the Gram route and B_hat C0^T in the direct one, where C0 is C with its diagonal set to 0 (the code's P may carry a
factor, D / N or N, which alpha takes back). The rest is elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..normalization import Normalization
from ..reference import BarlowTwinsTerms
from . import accelerator
from .operations import Weights

SLAB_ELEMENTS = 2**18  # a float32 slab of 1 MiB: a core's L2 cache
MIN_SLAB = 1024  # rows or columns: enough for the matrix product to run at full rate
NARROW_SLAB = 64  # columns, where nothing is multiplied: a few cache lines of a row
KEEP_ELEMENTS = 2**17  # inputs up to this size keep their standardised features: there, calls cost more than bytes
FEW_SAMPLES = 128  # below this the sums over slabs of K, which is small then, are kept in float64
BULK_RATIO = 32  # D / N from which K's bulk is taken out (``_bulk``)
PANEL = 128  # rows of the lower-triangle panels of a symmetric product
ONEDNN_MIN_FLOPS = 1e7  # below this, oneDNN's 20 us of set-up cost more than it saves
ONEDNN_MAX_ROWS = math.inf if "AVX512" in torch.backends.cpu.get_cpu_capability() else 64  # above, MKL is faster

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_ALL = slice(None)


class Normalized(NamedTuple):
    """Two views, and what it takes to standardise them: x_hat = (z - mean) * rstd + shift."""

    z_a: Tensor  # [N, D]
    z_b: Tensor  # [N, D]
    normalization: Normalization | None  # None: the inputs are used as they are, and there are no statistics
    c: Tensor  # [D] diag(C), in the dtype that everything is computed in
    stats: tuple[
        Tensor, ...
    ]  # rstd, biased variance, mean, shift, each [2, 1, D] (two views); or rstd, variance, x_hat

    def saved(self) -> list[Tensor]:
        """What a backward pass needs, beside the inputs, to build this again."""
        return [self.c, *self.stats]

    @classmethod
    def from_saved(
        cls, z_a: Tensor, z_b: Tensor, normalization: Normalization | None, saved: list[Tensor]
    ) -> Normalized:
        """Build again what ``saved`` was taken from."""
        return cls(z_a, z_b, normalization, saved[0], tuple(saved[1:]))

    def slab(self, rows: slice, columns: slice, out: Tensor | None = None) -> Tensor:  # [2, rows, columns]
        """A slab of A_hat and B_hat, written over ``out``, the last slab, if that has its shape."""
        if len(self.stats) == 3:
            return self.stats[2]  # small inputs are one slab, and it was kept
        if self.normalization is None:
            return _stack(self.z_a, self.z_b, rows, columns, out=out)
        rstd, _, mean, shift = (_cut(stat, columns) for stat in self.stats)
        x = _stack(self.z_a, self.z_b, rows, columns, less=mean, out=out)
        return torch.addcmul(shift, x, rstd, out=x)


def normalize(z_a: Tensor, z_b: Tensor, normalization: Normalization | None) -> Normalized:
    """Statistics of every feature of both views, and c = diag(C), in one pass over the inputs.

    ``normalization=None`` takes the inputs as they are and computes only c.
    """
    n, d = z_a.shape
    dtype = _compute_dtype(z_a)
    if normalization is None:
        c = z_a.new_empty(d, dtype=dtype)
        for s in _slabs(d, n, NARROW_SLAB):
            c[s] = (z_a[:, s].to(dtype) * z_b[:, s]).mean(0)
        return Normalized(z_a, z_b, None, c, ())
    mean, shift, var = (z_a.new_empty(2, 1, d, dtype=dtype) for _ in range(3))
    c = z_a.new_empty(d, dtype=dtype)
    x = square = None
    for s in _slabs(d, n, NARROW_SLAB):
        here, rest = _cut(mean, s), _cut(shift, s)
        for view, z in enumerate((z_a, z_b)):
            torch.mean(z[:, s], 0, dtype=dtype, out=here[view, 0])
        x = _stack(z_a, z_b, _ALL, s, less=here, out=x)
        x -= torch.mean(x, 1, keepdim=True, out=rest)  # what rounding left of the mean
        square = torch.mul(x, x, out=_like(x, square))
        torch.mean(square, 1, keepdim=True, out=_cut(var, s))
        torch.mean(torch.mul(x[0], x[1], out=square[0]), 0, out=_cut(c, s))
    rstd = normalization.rstd(var, n)
    c *= rstd.prod(0)[0]
    kept = (x.mul_(rstd),) if n * d <= KEEP_ELEMENTS else (mean, shift.mul_(rstd).neg_())
    return Normalized(z_a, z_b, normalization, c, (rstd, var, *kept))


def empty_saved(z_a: Tensor, route: str, normalization: Normalization | None) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of [product, *saved]."""
    n, d = z_a.shape
    c = z_a.new_empty(d, dtype=_compute_dtype(z_a))
    saved = [c.new_empty((2, n, n) if route == "gram" else (d, d)), c]
    if normalization is not None:
        saved += [c.new_empty(2, 1, d) for _ in range(2)]
        saved += [c.new_empty(2, n, d)] if n * d <= KEEP_ELEMENTS else [c.new_empty(2, 1, d) for _ in range(2)]
    return saved


def gram(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and K_a / D and K_b / D less the part that ``_bulk`` names, stacked, (2, N, N). 2 to 4 N^2 D FLOPs."""
    n, d = x.z_a.shape
    bulk = _bulk(x)
    if n * d <= KEEP_ELEMENTS and not bulk:
        x_hat = x.slab(_ALL, _ALL)
        k = torch.bmm(x_hat, x_hat.mT)
        return _terms(x, _off_diag(x, k.prod(0).sum(dtype=torch.float64)), lambd, scale), k.div_(d)
    k = x.c.new_zeros(2, n, n, dtype=torch.float64 if n < FEW_SAMPLES else x.c.dtype)
    diagonal = k.diagonal(dim1=1, dim2=2)  # (2, N)
    tau = iter(bulk)
    slab = None
    for s in _slabs(d, n):
        slab = x.slab(_ALL, s, out=slab)
        for x_hat in slab.split(MIN_SLAB if bulk else d, dim=2):
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


def _bulk(x: Normalized) -> list[Tensor]:
    """Where D is much larger than N: tau, how much K has of I - 1 1^T / N; (2, 1) for each MIN_SLAB features of a slab.

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
    return [part.sum(2) for s in _slabs(d, n) for part in _cut(power, s).split(MIN_SLAB, dim=2)]


def correlate(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor]:
    """The terms, and N C with its diagonal set to 0, (D, D). 2 N D^2 FLOPs."""
    n, d = x.z_a.shape
    c = x_hat = None
    for s in _slabs(n, d):
        x_hat = x.slab(s, _ALL, out=x_hat)
        part = _matmul_t(x_hat[0].T, x_hat[1].T, x.z_a.dtype)
        c = part if c is None else c.add_(part)
    c.fill_diagonal_(0)
    return _terms(x, _scalar(torch.linalg.vecdot(c, c).sum(dtype=torch.float64)) / n**2, lambd, scale), c


def _off_diag(x: Normalized, inner: Tensor) -> Tensor | float:
    """||C||^2 - sum_i C_ii^2, from <K_a, K_b>."""
    c = x.c.double()
    off_diag = _scalar(inner) / x.z_a.shape[0] ** 2 - _scalar(torch.dot(c, c))
    return off_diag.clamp_min(0) if isinstance(off_diag, Tensor) else max(off_diag, 0.0)  # NaN stays NaN in both


def _terms(x: Normalized, off_diag: Tensor | float, lambd: float, scale: float) -> BarlowTwinsTerms:
    """The terms as tensors; up to here they are in float64."""
    error = x.c.double() - 1
    on_diag = _scalar(torch.dot(error, error))
    terms = (scale * (on_diag + lambd * off_diag), on_diag, off_diag)
    if isinstance(on_diag, Tensor):
        return BarlowTwinsTerms(*(term.to(x.c.dtype) for term in terms))
    return BarlowTwinsTerms(*(torch.scalar_tensor(term, dtype=x.c.dtype) for term in terms))


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
    n, features = x.z_a.shape
    w_on, w_off = Weights(*(None if g is None else _scalar(g) for g in weights[:3]), *weights[3:]).of_sums()
    alpha = w_off * (2 / n)
    d = (x.c - 1).mul_(w_on * (2 / n))
    if route == "gram":  # its P contains C's diagonal
        d -= x.c * alpha
        alpha = alpha * (features / n)
        blocks = [(_ALL, s) for s in _slabs(features, n)]
    else:
        alpha = alpha / n  # its P has the factor N
        blocks = [(s, _ALL) for s in _slabs(n, features)]
    views = [view for view in range(2) if needs[view]]
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
        if route == "gram" and (bulk := _bulk(x)):
            tau = torch.stack(bulk).sum(0, dtype=torch.float64).to(rstd.dtype).flip(0)[..., None] / features
            own_0 += rstd_alpha * tau * x.normalization.remainder(rstd)
        # a feature's mean_n(A_hat * P) is N sum_j C0_ij^2, too; with D larger than N that is the less exact of the two
        mean_from_c = route == "direct" and (features <= n or len(blocks) > 1)
        if mean_from_c:
            own_1 *= 1 / n
            mean_p = [torch.linalg.vecdot(product, product, dim=1 - view) for view in range(2)]
    slab = own_p = None
    for rows, columns in blocks:
        slab = x.slab(rows, columns, out=slab)
        for view in views:
            own, other = slab[view], slab[1 - view]
            if route == "gram":
                p = _matmul_t(product[1 - view], own.T, x.z_a.dtype)
            else:
                p = _matmul_t(other, product.T if view else product, x.z_a.dtype)
            if x.normalization is None:
                p.mul_(alpha)
                last = (other, _cut(d, columns))
            else:
                if not mean_from_c:
                    own_p = torch.mul(own, p, out=_like(own, own_p))
                mean = mean_p[view] if mean_from_c else own_p.mean(0)
                p.mul_(_cut(rstd_alpha[view], columns)).addcmul_(other, _cut(rstd_d[view], columns))
                last = (own, torch.addcmul(_cut(own_0[view], columns), _cut(own_1[view], columns), mean))
            if len(blocks) == 1:
                grads[view] = p.addcmul_(*last).to(x.z_a.dtype)
            elif p.dtype == x.z_a.dtype:
                torch.addcmul(p, *last, out=grads[view][rows, columns])
            else:
                grads[view][rows, columns] = p.addcmul_(*last)
            del p  # before the next one is made
    return grads[0], grads[1]


def _scalar(x: Tensor) -> Tensor | float:
    """A 0-d tensor as Python's number, which is faster to compute with; one without data, fake or on meta, as it is."""
    return x.item() if x.device.type == "cpu" and type(x) is Tensor else x


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def _stack(
    z_a: Tensor, z_b: Tensor, rows: slice, columns: slice, less: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """A slab of both views, [2, rows, columns], minus ``less``, in the dtype that everything is computed in."""
    if (rows, columns) != (_ALL, _ALL):
        z_a, z_b = z_a[rows, columns], z_b[rows, columns]
    if out is None or out.shape[1:] != z_a.shape:
        out = z_a.new_empty(2, *z_a.shape, dtype=_compute_dtype(z_a))
    if less is None:
        return torch.stack((z_a, z_b), out=out)
    for view, z in enumerate((z_a, z_b)):
        torch.sub(z, less[view], out=out[view])
    return out


def _like(x: Tensor, last: Tensor | None) -> Tensor:
    """Room for a tensor like ``x``: the ``last`` slab's, which costs no new pages, or new."""
    return torch.empty_like(x) if last is None or last.shape != x.shape else last


def _slabs(length: int, other: int, least: int = MIN_SLAB) -> Iterator[slice]:
    """Cut ``length`` columns (or rows) of ``other`` elements each into slabs, each of at least ``least`` of them."""
    step = max(least, SLAB_ELEMENTS // other)
    if length <= step:
        yield _ALL
        return
    for start in range(0, length, step):
        yield slice(start, start + step)


def _cut(per_feature: Tensor, columns: slice) -> Tensor:
    """The part of a per-feature tensor that belongs to a slab."""
    return per_feature if columns == _ALL else per_feature[..., columns]


def _matmul_t(x: Tensor, y: Tensor, input_dtype: torch.dtype) -> Tensor:  # [M, K], [L, K] -> [M, L]
    """x @ y.T by the library that multiplies fastest; on accelerators in the inputs' dtype with float32 sums."""
    if x.device.type == "cpu":
        large = 2 * x.shape[0] * x.shape[1] * y.shape[0] > ONEDNN_MIN_FLOPS
        if large and x.shape[0] <= ONEDNN_MAX_ROWS and x.dtype == torch.float32 and _ONEDNN is not None:
            return _ONEDNN(x, y, None, "none", [], "")
    elif input_dtype in (torch.float16, torch.bfloat16):
        return accelerator.matmul(x.to(input_dtype), y.to(input_dtype).T)
    return x @ y.T
