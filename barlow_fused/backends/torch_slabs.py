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

import dataclasses
import math
from collections.abc import Iterator

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
MIN_ONEDNN_OUTPUT = 256  # rows and columns of A^T B: below that, oneDNN leaves cores idle
ONEDNN_MAX_ROWS = math.inf if "AVX512" in torch.backends.cpu.get_cpu_capability() else 64  # above, MKL is faster

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_ALL = slice(None)


@dataclasses.dataclass
class Normalized:
    """Two views, and the statistics of every feature, which a route computes on its first walk over the inputs."""

    z_a: Tensor  # [N, D]
    z_b: Tensor  # [N, D]
    normalization: Normalization | None  # None: the inputs are used as they are, and there are no statistics
    c: Tensor | None = None  # [D] diag(C), in the dtype that everything is computed in
    # Each [2, 1, D] (two views): rstd, biased variance, mean, and what rounding left of it (Gram: times -rstd, to be
    # added). Small inputs are one slab, kept in the place of the last two: standardised (Gram) or centred (direct).
    stats: tuple[Tensor, ...] = ()

    def saved(self) -> list[Tensor]:
        """What a backward pass needs, beside the inputs, to build this again."""
        return [self.c, *self.stats]

    @classmethod
    def from_saved(
        cls, z_a: Tensor, z_b: Tensor, normalization: Normalization | None, saved: list[Tensor]
    ) -> Normalized:
        """Build again what ``saved`` was taken from."""
        return cls(z_a, z_b, normalization, saved[0], tuple(saved[1:]))

    def standardized(self, columns: slice, out: Tensor | None = None) -> Tensor:  # [2, N, columns]
        """Some features of A_hat and B_hat, written over ``out``, the last slab, if that has its shape."""
        if len(self.stats) == 3:
            return self.stats[2]
        if self.normalization is None:
            return _stack(self.z_a, self.z_b, _ALL, columns, out=out)
        rstd, _, mean, shift = (_cut(stat, columns) for stat in self.stats)
        x = _stack(self.z_a, self.z_b, _ALL, columns, less=mean, out=out)
        return torch.addcmul(shift, x, rstd, out=x)

    def centred(self, rows: slice, out: Tensor | None = None) -> Tensor:  # [2, rows, D]
        """Some samples of z_a and z_b less their means as they were rounded, likewise."""
        if len(self.stats) == 3:
            return self.stats[2]
        return _stack(self.z_a, self.z_b, rows, _ALL, less=self.stats[2] if self.stats else None, out=out)


def normalize(z_a: Tensor, z_b: Tensor, normalization: Normalization | None) -> Normalized:
    """Nothing yet: which statistics are needed, and in which order, depends on the route."""
    return Normalized(z_a, z_b, normalization)


def _standardize(x: Normalized) -> None:
    """For the Gram route: statistics of every feature of both views, and c = diag(C), in one pass over the inputs."""
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
    _standardize(x)
    bulk = _bulk(x)
    if n * d <= KEEP_ELEMENTS and not bulk:
        x_hat = x.standardized(_ALL)
        k = torch.bmm(x_hat, x_hat.mT)
        return _terms(x, _off_diag(x, k.prod(0).sum(dtype=torch.float64)), lambd, scale), k.div_(d)
    k = x.c.new_zeros(2, n, n, dtype=torch.float64 if n < FEW_SAMPLES else x.c.dtype)
    diagonal = k.diagonal(dim1=1, dim2=2)  # (2, N)
    tau = iter(bulk)
    slab = None
    for s in _slabs(d, n):
        slab = x.standardized(s, out=slab)
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
    """The terms, and C with its diagonal set to 0, (D, D). 2 N D^2 FLOPs, in one pass over slabs of centred rows.

    C's diagonal is summed apart: where it is close to 1 the gradient is a small difference, for which the product's
    float32 sums over N samples are not exact enough.
    """
    n, d = x.z_a.shape
    slabs = list(_slabs(n, d))
    centred = x.normalization is not None
    mean = x.z_a.new_empty(2, 1, d, dtype=_compute_dtype(x.z_a)) if centred else None
    for view, z in enumerate((x.z_a, x.z_b) if centred else ()):
        _mean(z, mean[view, 0])
    c = moments = rest = slab = square = None
    for rows in slabs:
        slab = _stack(x.z_a, x.z_b, rows, _ALL, less=mean, out=slab)
        if centred:  # what rounding left of the mean: removed from the slab if that is all, else from what is summed
            rest = _add(rest, slab.sum(1, keepdim=True))
            if len(slabs) == 1:
                slab -= rest.div_(n)
        if square is None or square.shape[1] != slab.shape[1]:
            square = slab.new_empty(3, *slab.shape[1:])
        torch.mul(slab, slab, out=square[:2])
        torch.mul(slab[0], slab[1], out=square[2])
        moments = _add(moments, square.sum(1, keepdim=True))  # (3, 1, D)
        c = _add_product(c, slab)
    moments /= n
    if not centred:
        x.c = moments[2, 0]
        return _terms_of(x, c.mul_(1 / n), lambd, scale), c
    if len(slabs) > 1:
        rest /= n
        of_rest = torch.cat((rest * rest, rest[:1] * rest[1:]))
        moments -= of_rest
        moments[:2] *= moments[:2] > of_rest[:2] * 1e-5  # else it is the rounding of a constant feature's mean
        c.addr_(rest[0, 0], rest[1, 0], alpha=-n)
    rstd = x.normalization.rstd(moments[:2], n)
    kept = (slab,) if n * d <= KEEP_ELEMENTS else (mean, rest)
    x.stats = (rstd, moments[:2], *kept)
    x.c = (moments[2, 0] * rstd[0, 0]).mul_(rstd[1, 0])
    return _terms_of(x, c.mul_((rstd[0] / n).T).mul_(rstd[1]), lambd, scale), c


def _terms_of(x: Normalized, c: Tensor, lambd: float, scale: float) -> BarlowTwinsTerms:
    """The terms from C, whose diagonal is set to 0."""
    c.fill_diagonal_(0)
    return _terms(x, _scalar(torch.linalg.vecdot(c, c).sum(dtype=torch.float64)), lambd, scale)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _mean(z: Tensor, out: Tensor) -> None:  # [N, D] -> [D]
    """The mean of every feature, in ``out``'s dtype: where that is not z's, operators would copy all of z."""
    if z.dtype == out.dtype:
        torch.mean(z, 0, out=out)
        return
    for s in _slabs(z.shape[1], z.shape[0], NARROW_SLAB):
        torch.mean(z[:, s], 0, dtype=out.dtype, out=out[s])


def _add_product(product: Tensor | None, slab: Tensor) -> Tensor:  # [D, D], [2, N, D] -> [D, D]
    """product + A^T B."""
    a, b = slab
    if _by_onednn(a.T, b.T) and a.shape[1] >= MIN_ONEDNN_OUTPUT:
        part = _matmul_t(a.T, b.T, a.dtype)
        return _add(product, part)
    return a.T @ b if product is None else torch.addmm(product, a.T, b, out=product)


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
    return BarlowTwinsTerms(*(_tensor(term, x.c) for term in terms))


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
    return (_gram_grad if route == "gram" else _direct_grad)(x, product, alpha, d, views)


def _gram_grad(
    x: Normalized, product: Tensor, alpha: Tensor | float, d: Tensor, views: list[int]
) -> tuple[Tensor | None, Tensor | None]:
    n, features = x.z_a.shape
    d -= x.c * alpha  # P contains C's diagonal
    alpha = alpha * (features / n)
    blocks = list(_slabs(features, n))
    grads: list[Tensor | None] = [None, None]
    if len(blocks) > 1:
        for view in views:
            grads[view] = torch.empty_like((x.z_a, x.z_b)[view])
    if (
        x.normalization is not None
    ):  # grad = rstd_alpha * P + rstd_d * other + (own_0 + rstd_own * mean_n(own * P)) * own
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
        slab = x.standardized(columns, out=slab)
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


def _direct_grad(
    x: Normalized, c: Tensor, alpha: Tensor | float, d: Tensor, views: list[int]
) -> tuple[Tensor | None, Tensor | None]:
    """One product a view: grad_a = B G^T + A * of_a, of the centred views A and B, with of_a = -kappa_a rstd_a^2 m and

    G_ij = alpha C_ij rstd_a,i rstd_b,j, but d_i rstd_a,i rstd_b,i on the diagonal.
    """
    n, features = x.z_a.shape
    blocks = list(_slabs(n, features))
    grads: list[Tensor | None] = [torch.empty_like(z) if v in views else None for v, z in enumerate((x.z_a, x.z_b))]
    rest = x.stats[3] if len(x.stats) == 4 else None
    # m is alpha sum_j C_ij^2 + d_i C_ii, too; with D larger than N that is the less exact of the two
    m_from_c = features <= n or len(blocks) > 1
    if x.normalization is None:
        g = c * alpha
        g.diagonal().copy_(d)
    else:
        rstd, var = x.stats[:2]
        g = (c * (rstd[0] * alpha).T).mul_(rstd[1])
        g.diagonal().copy_((rstd[0, 0] * d).mul_(rstd[1, 0]))
        of_own = (rstd * rstd).mul_(-x.normalization.kappa(var, n))
        if m_from_c:
            square = c * c
            m = torch.stack([square.sum(1 - view) for view in range(2)]).mul_(alpha)
            del square  # it is as large as C
            of_own *= m.add_(d * x.c)[:, None]
            if rest is not None:  # what the rounded means make of it, to be taken off
                constant = [torch.addmm(rest[v] * of_own[v], rest[1 - v], g if v else g.T).neg_() for v in range(2)]
    slab = None
    for rows in blocks:
        slab = x.centred(rows, out=slab)
        onednn = _by_onednn(slab[0], g)
        if rest is not None and (onednn or not m_from_c):
            slab -= rest
        for view in views:
            own, other, right = slab[view], slab[1 - view], g if view else g.T
            grad = grads[view][rows]
            out = grad if grad.dtype == own.dtype else None
            if onednn or not m_from_c or x.normalization is None:
                p = _matmul_t(other, right.T, x.z_a.dtype)
                if x.normalization is not None:
                    of_p = of_own[view] if m_from_c else of_own[view] * (own * p).mean(0)
                    p = torch.addcmul(p, own, of_p, out=p if out is None else out)
            else:  # the product is added to what is there, which costs it nothing
                p = (
                    torch.mul(own, of_own[view], out=out)
                    if rest is None
                    else torch.addcmul(constant[view], own, of_own[view], out=out)
                )
                p.addmm_(other, right)
            if p is not grad:
                grad.copy_(p)
            del p  # before the next one is made
    return grads[0], grads[1]


def _tensor(number: float, like: Tensor) -> Tensor:
    """A 0-d tensor of ``like``'s dtype, infinite where that has no such number; on its device, whatever the default."""
    if abs(number) > torch.finfo(like.dtype).max:
        number = math.copysign(math.inf, number)
    return torch.scalar_tensor(number, dtype=like.dtype, device=like.device)


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


def _by_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether oneDNN multiplies x @ y.T fastest."""
    large = 2 * x.shape[0] * x.shape[1] * y.shape[0] > ONEDNN_MIN_FLOPS
    return (
        large
        and x.device.type == "cpu"
        and x.shape[0] <= ONEDNN_MAX_ROWS
        and x.dtype == torch.float32
        and _ONEDNN is not None
    )


def _matmul_t(x: Tensor, y: Tensor, input_dtype: torch.dtype) -> Tensor:  # [M, K], [L, K] -> [M, L]
    """x @ y.T by the library that multiplies fastest; on accelerators in the inputs' dtype with float32 sums."""
    if _by_onednn(x, y):
        return _ONEDNN(x, y, None, "none", [], "")
    if x.device.type != "cpu" and input_dtype in (torch.float16, torch.bfloat16):
        return accelerator.matmul(x.to(input_dtype), y.to(input_dtype).T)
    return x @ y.T
