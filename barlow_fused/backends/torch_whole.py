"""The four operations for accelerators, by PyTorch's operators: whole matrices, library products, few launches.

A CPU wants slabs that its caches hold (torch_slabs.py). A GPU wants the opposite: every operator is a launch, which
takes microseconds however little it computes. So an operator here takes all features, and both views where it can. Only
where temporaries would take more than ``CHUNK_BYTES`` they are made for a chunk of columns at a time.

                 reads                 writes
    normalize    z_a, z_b twice        A_hat and B_hat in the dtype that is multiplied, [N, 2, pitch]
    gram         both                  K_a and K_b, [2, N, N]: one batched product over both views and slices of D
    correlate    both                  C, [D, D]: one product
    input_grad   both, and z_a, z_b    the gradients: a product a view, and five passes over its result

Half-precision inputs are multiplied in their dtype, with float32 sums and results. Everything else is in float32
(float64 for float64 inputs), the scalars in float64 where the device has it. Nothing waits for the device and no number
comes from the host, so that a call can be captured in a graph. The same input gives the same bits if the library's
products do.
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
from .triton_kernels import configs

CHUNK_BYTES = 2**27  # of a chunk's temporaries
SUM_LENGTH = 8192  # products that a matrix unit adds up by itself: it does so with fewer bits than float32
WIDE_ROWS = 1024  # up to so many rows K is kept in float64 between its product and its rounding
MANY_ROWS = 1024  # from so many rows only K's lower triangle is computed, in panels of at least half as many
SLICE_COLUMNS = 256  # a slice of D is no narrower
ALIGNMENT = 16  # bytes: where rows begin, for the library's fastest kernels


@dataclasses.dataclass(frozen=True)
class Normalized:
    """Two views, standardised, and every feature's statistics."""

    z_a: Tensor  # [N, D]
    z_b: Tensor  # [N, D]
    normalization: Normalization | None  # None: the inputs are used as they are, and there are no statistics
    hats: Tensor  # [N, 2, pitch] A_hat and B_hat side by side, and zeros; pitch >= D
    c: Tensor  # [D] diag(C)
    stats: tuple[Tensor, ...]  # mean, variance, rstd, each [2, D]

    def saved(self) -> list[Tensor]:
        """What a backward pass needs, beside the inputs, to build this again."""
        return [self.hats, self.c, *self.stats]

    @classmethod
    def from_saved(
        cls, z_a: Tensor, z_b: Tensor, normalization: Normalization | None, saved: list[Tensor]
    ) -> Normalized:
        """Build again what ``saved`` was taken from."""
        return cls(z_a, z_b, normalization, saved[0], saved[1], tuple(saved[2:]))

    @property
    def views(self) -> tuple[Tensor, Tensor]:  # [N, D], [N, D]
        """A_hat and B_hat."""
        d = self.z_a.shape[1]
        return self.hats[:, 0, :d], self.hats[:, 1, :d]

    def exact(self) -> Normalized:
        """The same with A_hat and B_hat in the dtype that everything else is computed in."""
        if self.hats.dtype == self.c.dtype:
            return self
        hats = torch.stack((self.z_a, self.z_b), 1).to(self.c.dtype)
        if self.normalization is not None:
            mean, _, rstd = self.stats
            hats = hats.sub_(mean).mul_(rstd)
        return dataclasses.replace(self, hats=hats)


def normalize(z_a: Tensor, z_b: Tensor, normalization: Normalization | None) -> Normalized:
    """A_hat and B_hat, and every feature's statistics and c = diag(C)."""
    n, d = z_a.shape
    hats, c = _empty_hats(z_a, normalization), z_a.new_empty(d, dtype=_compute_dtype(z_a))
    if hats.shape[2] > d:
        hats[:, :, d:].zero_()
    by_view = hats.transpose(0, 1)  # (2, N, pitch)
    exact = hats.dtype == c.dtype  # then views are standardised where they stay, else before they are rounded
    mean = c.new_empty(2, d)
    of_chunks = []  # variance and rstd
    for q in _chunks(n, d, c.dtype, arrays=1 if exact else 2):
        x = by_view[:, :, q] if exact else c.new_empty(2, n, q.stop - q.start)
        for view, z in enumerate((z_a, z_b)):
            if normalization is None:
                x[view].copy_(z[:, q])
            else:
                torch.mean(z[:, q], 0, dtype=c.dtype, out=mean[view, q])
                torch.sub(z[:, q], mean[view, q], out=x[view])
        if normalization is not None:
            var, rest = torch.var_mean(x, 1, correction=0)
            rstd = normalization.rstd(var, n)
            of_chunks.append((var, rstd))
            if exact:
                x -= rest[:, None]  # what rounding left of the mean; half precision rounds far more
            torch.mul(x, rstd[:, None], out=by_view[:, :, q])
        elif not exact:
            by_view[:, :, q].copy_(x)
        torch.mean(torch.mul(x[0], x[1], out=None if exact else x[0]), 0, out=c[q])
    if normalization is None:
        return Normalized(z_a, z_b, None, hats, c, ())
    var, rstd = (t[0] if len(t) == 1 else torch.cat(t, 1) for t in zip(*of_chunks, strict=True))
    if not exact:
        c.mul_(rstd[0]).mul_(rstd[1])
    return Normalized(z_a, z_b, normalization, hats, c, (mean, var, rstd))


def empty_saved(z_a: Tensor, route: str, normalization: Normalization | None) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of [product, *saved]."""
    n, d = z_a.shape
    hats, c = _empty_hats(z_a, normalization), z_a.new_empty(d, dtype=_compute_dtype(z_a))
    stats = [] if normalization is None else [c.new_empty(2, d) for _ in range(3)]
    product = hats.new_empty(2, n, n) if route == "gram" else (c if 2 * n < d else hats).new_empty(d, d)
    return [product, hats, c, *stats]


def gram(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor | None]:
    """The terms, and K_a / D and K_b / D, less I - 1 1^T / N where features are standardised, (2, N, N).

    Where D is much larger than N, that part is nearly all of K, and the normalisation's backward pass takes out again
    what it makes of the gradient. Without it the rest can be rounded to half precision.
    """
    n, d = x.z_a.shape
    wide = accelerator.widest(x.c)
    k = _gram_matrices(x, wide if n <= WIDE_ROWS else x.c.dtype)
    c = x.c.to(wide)
    off_diag = torch.mul(k[0], k[1]).mean(dtype=wide).sub_(torch.dot(c, c)).clamp_min_(0)  # <K_a, K_b> / N^2 - c^2
    terms = _terms(x, c, off_diag, lambd, scale)
    if not need_grad:
        return terms, None
    if x.normalization is not None:
        k.diagonal(dim1=1, dim2=2).sub_(d)
        k += d / n
    return terms, torch.mul(k, 1 / d, out=x.hats.new_empty(2, n, n))


def correlate(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor | None]:
    """The terms, and C with its diagonal set to 0, (D, D).

    Where D is much larger than N, C is mostly noise, which rounding would change. If this route is asked for there,
    half-precision inputs are multiplied in float32.
    """
    n, d = x.z_a.shape
    exact = x.exact() if 2 * n < d else x
    a_hat, b_hat = exact.views
    wide = accelerator.widest(x.c)
    product = accelerator.matmul(a_hat.T, b_hat).fill_diagonal_(0).div_(n)
    off_diag = torch.mul(product, product).sum(dtype=wide)
    terms = _terms(x, x.c.to(wide), off_diag, lambd, scale)
    return terms, product.to(exact.hats.dtype) if need_grad else None


def input_grad(
    x: Normalized,
    product: Tensor,  # what gram or correlate returned
    route: str,
    weights: Weights,
    needs: tuple[bool, bool],  # which of the two gradients are wanted
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dz_a and dL/dz_b, with P = K_b A_hat (Gram) or B_hat C0^T (direct) for view a:

    grad_a = rstd_a * (alpha * P + d * B_hat - kappa_a * mean_n(A_hat * (alpha * P + d * B_hat)) * A_hat)
    """
    n, features = x.z_a.shape
    x = x if product.dtype == x.hats.dtype else x.exact()
    factors = _Factors(x, weights, route)
    grads = tuple(torch.empty_like(z) if need else None for z, need in zip((x.z_a, x.z_b), needs, strict=True))
    for q in _chunks(n, features, x.c.dtype, arrays=2 if factors.rounded else 1):
        for view in (view for view in range(2) if needs[view]):
            own, other = x.views[view], x.views[1 - view]
            if route == "gram":
                left, right = product[1 - view], own[:, q]
            else:
                left, right = other, (product if view else product.T)[:, q]
            factors.write(left, right, view, q, grads[view][:, q])
    return grads


class _Factors:
    """grad = f_P * P - f_other * other + f_own * own + f_1, with a number a feature.

    own and other are the standardised views. Where these are rounded, z itself is taken, and f_1 centres it.
    """

    def __init__(self, x: Normalized, weights: Weights, route: str) -> None:
        self.x = x
        self.rounded = x.z_a.dtype != x.c.dtype  # are the gradients
        self.raw = x.hats.dtype != x.c.dtype and x.normalization is not None
        self.sources = (x.z_a, x.z_b) if self.raw else x.views
        alpha, d = self._of_sums(weights, route)
        if x.normalization is None:
            self.of_p, self.of_other = alpha.expand(2, 1), d.expand(2, -1)
            return
        mean, var, rstd = x.stats
        square = rstd * rstd
        kappa = x.normalization.kappa(var, x.z_a.shape[0])
        self.of_p = rstd * alpha
        own = d * x.c  # kappa mean_n(own * d other)
        biased = not isinstance(kappa, Tensor) and kappa == 1
        own = own if biased else own * kappa
        if route == "gram":  # what the normalisation leaves of the part that was taken out of K
            power = square if x.normalization.remainder_power == 2 else rstd
            own = torch.addcmul(own, power, alpha, value=x.normalization.eps)
        of_mean = self.of_p if biased else self.of_p * kappa
        if self.raw:
            self.mean = mean
            self.of_other = torch.mul(rstd[0], rstd[1]).mul_(d).expand(2, -1)
            self.of_one = self.of_other * mean  # of the other view
            self.own, self.of_mean = square * own, of_mean * rstd
        else:
            self.of_other, self.own, self.of_mean = rstd * d, rstd * own, of_mean

    def _of_sums(self, weights: Weights, route: str) -> tuple[Tensor, Tensor]:
        """alpha, [], and -d, [D], of input_grad's formula; in the Gram route P contains C's diagonal."""
        n, features = self.x.z_a.shape
        c, two, gram = self.x.c, 2 / n, float(route == "gram")
        of_alpha = two * features / n if gram else two
        if weights.g_on is None and weights.g_off is None:
            w_on, w_off = weights.scale, weights.scale * weights.lambd
            d = torch.rsub(c, two * w_on, alpha=two * (w_on - gram * w_off))
            return weights.g_loss * (of_alpha * w_off), d.mul_(weights.g_loss)
        w_on, w_off = (w if isinstance(w, Tensor) else c.new_zeros(()) for w in weights.of_sums())
        return w_off * of_alpha, torch.addcmul(w_on, c, w_on - gram * w_off, value=-1).mul_(two)

    def write(self, left: Tensor, right: Tensor, view: int, q: slice, grad: Tensor) -> None:
        """A chunk of a view's gradient; P = left @ right."""
        own, other = self.sources[view][:, q], self.sources[1 - view][:, q]
        of_p, of_other = (f[view] if f.shape[1] == 1 else f[view, q] for f in (self.of_p, self.of_other))
        p = accelerator.matmul(left, right) if self.rounded else torch.mm(left, right, out=grad)
        if self.x.normalization is None:
            torch.addcmul(p.mul_(of_p), other, of_other, value=-1, out=grad)
            return
        t = torch.mul(self.x.views[view][:, q], p)
        of_own = torch.addcmul(self.own[view, q], self.of_mean[view, q], t.mean(0), value=-1)
        if self.raw:
            one = torch.addcmul(self.of_one[1 - view, q], of_own, self.mean[view, q], value=-1)
            torch.addcmul(one, other, of_other, value=-1, out=t).addcmul_(own, of_own)
            torch.addcmul(t, p, of_p, out=grad)
        else:
            p.mul_(of_p).addcmul_(other, of_other, value=-1)
            torch.addcmul(p, own, of_own, out=grad)


def _gram_matrices(x: Normalized, dtype: torch.dtype) -> Tensor:
    """K_a and K_b, [2, N, N]. D is cut into slices, whose products are added up in ``dtype``."""
    n, _, pitch = x.hats.shape
    slices, panels = _slices(n, x.z_a.shape[1], x.hats.device), _panels(n)
    h = x.hats.view(n, 2 * slices, pitch // slices).transpose(0, 1)  # (2 S, N, pitch / S)
    if slices == len(panels) == 1:
        return accelerator.bmm(h, h.mT).to(dtype)
    k = x.c.new_empty(2, n, n, dtype=dtype)
    for rows in panels:
        _gram_panel(h, rows, slices, k[:, rows, : rows.stop])
        if rows.start:
            k[:, : rows.start, rows].copy_(k[:, rows, : rows.start].mT)
    return k


def _gram_panel(h: Tensor, rows: slice, slices: int, out: Tensor) -> None:
    """Rows of K_a and K_b up to their diagonal, [2, rows, columns]: as many slices at once as fit into CHUNK_BYTES."""
    at_once = max(1, CHUNK_BYTES // (out.numel() * max(4, h.element_size())))
    if at_once >= slices:
        parts = accelerator.bmm(h[:, rows], h[:, : rows.stop].mT)
        torch.sum(parts.view(2, slices, *out.shape[1:]), 1, dtype=out.dtype, out=out)
        return
    out.zero_()
    for view in range(2):
        for start in range(0, slices, at_once):
            part = h[view * slices + start : view * slices + min(start + at_once, slices)]
            out[view] += accelerator.bmm(part[:, rows], part[:, : rows.stop].mT).sum(0, dtype=out.dtype)


def _panels(n: int) -> list[slice]:
    """Rows of K that are computed at once: all, or where that saves more than launches cost, two or four parts."""
    count = 1 if n < MANY_ROWS else 2 if n < 4 * MANY_ROWS else 4
    edges = [n * i // count for i in range(count + 1)]
    return list(map(slice, edges[:-1], edges[1:]))


def _slices(n: int, d: int, device: torch.device) -> int:
    """Into how many slices of D a Gram product is cut, to fill the device and to keep sums short; a power of two."""
    tiles = 2 * (-(-n // 128)) ** 2
    wanted = max(d / SUM_LENGTH, min(32, accelerator.units(device) / tiles))
    return 2 ** math.ceil(math.log2(max(1, min(wanted, d / SLICE_COLUMNS))))


def _chunks(n: int, d: int, dtype: torch.dtype, arrays: int) -> Iterator[slice]:
    """Columns of which so many arrays of N rows fit into CHUNK_BYTES."""
    step = max(SLICE_COLUMNS, CHUNK_BYTES // (arrays * n * dtype.itemsize) // SLICE_COLUMNS * SLICE_COLUMNS)
    return (slice(start, min(start + step, d)) for start in range(0, max(d, 1), step))


def _terms(x: Normalized, c: Tensor, off_diag: Tensor, lambd: float, scale: float) -> BarlowTwinsTerms:
    """The terms in the compute dtype, from c and off_diag in the widest."""
    error = c - 1
    on_diag = torch.dot(error, error)
    loss = x.c.new_empty(())
    if scale == 1:
        torch.add(on_diag, off_diag, alpha=lambd, out=loss)
    else:
        torch.mul(torch.add(on_diag, off_diag, alpha=lambd), scale, out=loss)
    return BarlowTwinsTerms(loss, on_diag.to(loss.dtype), off_diag.to(loss.dtype))


def _empty_hats(z: Tensor, normalization: Normalization | None) -> Tensor:  # [N, 2, pitch]
    n, d = z.shape
    dtype = configs.compute_dtype(n, d, z.dtype, normalization is not None)
    unit = ALIGNMENT // dtype.itemsize * _slices(n, d, z.device)
    return z.new_empty(n, 2, -(-d // unit) * unit, dtype=dtype)


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)
