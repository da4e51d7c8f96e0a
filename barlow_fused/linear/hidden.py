"""The hidden route: the loss of z = h W^T without z, for H hidden units that are fewer than N samples.

N samples of H units span H dimensions, in which everything happens. With the thin QR decomposition of the centred
activations, h_x = sqrt(N) Q_x R_x, and J = Q_a^T Q_b, (H, H), a feature with the weight w has

    y_x = R_x w        variance |y_x|^2        y_hat_x = rstd_x y_x        C_ii = y_hat_a^T J y_hat_b

and with T_x = sum of y_hat_x y_hat_x^T over the features, ||C||^2 = <T_a, J T_b J^T>. That is the Gram route with H
samples in place of N: it takes features by slabs, and keeps two (H, H) matrices. A variance is a sum of squares, as
exact as that of z itself; of w^T (h^T h / N) w no digit would be right where w is near the null space of h. For view a
(b: exchange a and b, J and J^T), with the numbers alpha and d of ``torch_slabs.input_grad``,

    P_a  = J T_b J^T - nu I                  nu = tr(J T_b J^T) / H: the part of it that the normalisation takes out
    g_a  = alpha P_a y_hat_a + d J y_hat_b - e_a y_hat_a
    e_a  = kappa_a y_hat_a^T (alpha P_a y_hat_a + d J y_hat_b) - alpha nu (1 - kappa_a |y_hat_a|^2)
    dL/dW   = N (rstd_a g_a^T R_a + rstd_b g_b^T R_b)
    dL/dh_a = sqrt(N) (Q_a sum rstd_a g_a w^T  +  (Q_b - Q_a J) (alpha T_b J^T F_a + sum rstd_a d y_hat_b w^T))
    F_a  = sum rstd_a y_hat_a w^T

where sums are over the features. The last term is what leaves the span of h_a: nothing where both views are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import accelerator
from ..backends.operations import Spec, Weights
from ..backends.slabs import _matmul_t
from ..normalization import Normalization
from ..reference import BarlowTwinsTerms
from .slabs import Grads, activations

SLAB_ELEMENTS = 2**19  # of y, for both views
SLAB_BYTES = 2**27  # the same on accelerators


class Basis(NamedTuple):
    """What both views' activations span, in the widest dtype."""

    q: Tensor  # [2, N, R] orthonormal; R = min(N, H)
    r: Tensor  # [2, R, H]
    j: Tensor  # [R, R] Q_a^T Q_b


class Passes:
    """The forward and the backward pass (backends/operations.py)."""

    def forward(
        self, h_a: Tensor, h_b: Tensor, weight: Tensor, spec: Spec, need_grad: bool, every_term: bool
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The terms, and what the backward pass needs (nothing where no gradient is wanted)."""
        with accelerator.without_autocast(h_a.device.type):
            basis = _basis(h_a, h_b, spec.normalization)
            n, d = len(h_a), len(weight)
            features = _Features(basis, weight, n, spec)
            size = basis.j.shape[0]
            t, f = basis.j.new_zeros(2, size, size), basis.j.new_zeros(2, *basis.r.shape[1:])
            c = features.r.new_empty(d)
            for s in features.slabs():
                w, y, rstd, _ = features.standardized(s)  # y: (2, R, columns)
                c[s] = (y[0] * features.times_j(y[1])).sum(0)
                scaled = y * rstd
                for view in range(2):
                    t[view] += _matmul_t(y[view], y[view], y.dtype)
                    if need_grad:
                        f[view] += _matmul_t(scaled[view], w.T, y.dtype)
            wide = c.to(t.dtype)
            inner = (t[0] * (basis.j @ t[1] @ basis.j.T)).sum()
            on_diag, off_diag = (wide - 1).square().sum(), (inner - wide.square().sum()).clamp_min(0)
            terms = BarlowTwinsTerms(spec.scale * (on_diag + spec.lambd * off_diag), on_diag, off_diag)
            terms = BarlowTwinsTerms(*(term.to(c.dtype) for term in terms))
        return terms if every_term else terms[:1], [t, f, c, *basis] if need_grad else []

    def backward(
        self,
        h_a: Tensor,
        h_b: Tensor,
        weight: Tensor,
        saved: list[Tensor],
        spec: Spec,
        g_terms: tuple[Tensor | None, Tensor | None, Tensor | None],
        needs: tuple[bool, bool, bool],
    ) -> Grads:
        """The gradients; None in place of one that is not needed."""
        with accelerator.without_autocast(h_a.device.type):
            return _backward(h_a, weight, saved, spec, g_terms, needs)

    def empty_saved(
        self, h_a: Tensor, h_b: Tensor, weight: Tensor, route: str, normalization: Normalization | None
    ) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes of what ``forward`` saves."""
        (n, h), d = h_a.shape, len(weight)
        size = min(n, h)
        c = h_a.new_empty(d, dtype=torch.promote_types(h_a.dtype, torch.float32))
        shapes = [(2, size, size), (2, size, h), (2, n, size), (2, size, h), (size, size)]
        t, f, *basis = (h_a.new_empty(shape, dtype=accelerator.widest(c)) for shape in shapes)
        return [t, f, c, *basis]


def _basis(h_a: Tensor, h_b: Tensor, normalization: Normalization | None) -> Basis:
    h = activations(h_a, h_b, normalization is not None)
    h = h.to(accelerator.widest(h))
    if normalization is not None:
        h = h - h.mean(1, keepdim=True)
    q, r = torch.linalg.qr(h / len(h_a) ** 0.5)
    q, r = q.contiguous(), r.contiguous()  # as torch.compile is told
    return Basis(q, r, q[0].mT @ q[1])


class _Features:
    """Slabs of features, in the coordinates of the basis and in the dtype that everything else is computed in."""

    def __init__(self, basis: Basis, weight: Tensor, n: int, spec: Spec) -> None:
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.weight, self.n, self.spec = weight, n, spec
        self.r, self.j = basis.r.to(self.dtype), basis.j.to(self.dtype)
        self.least = basis.r.square().sum((1, 2)).mul_((4 * torch.finfo(self.dtype).eps) ** 2).to(self.dtype)

    def slabs(self) -> Iterator[slice]:
        """As many features at a time as caches hold, or memory should."""
        on_cpu = self.weight.device.type == "cpu"
        elements = SLAB_ELEMENTS if on_cpu else SLAB_BYTES // self.dtype.itemsize
        step = self.spec.chunk or max(256, elements // (2 * self.r.shape[1]))
        return (slice(start, start + step) for start in range(0, len(self.weight), step))

    def standardized(self, s: slice) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
        """w, [columns, H]; y_hat, [2, R, columns]; rstd and kappa, [2, 1, columns] or numbers."""
        w = self.weight[s].to(self.dtype).contiguous()
        y = _matmul_t(self.r.flatten(0, 1), w, self.dtype).view(2, -1, len(w))
        convention = self.spec.normalization
        if convention is None:
            return w, y, 1.0, 0.0
        var = y.square().sum(1, keepdim=True)
        known = var > self.least[:, None, None] * w.square().sum(1)  # or rounding made it, which rstd would enlarge
        y, var = y.mul_(known), var.mul_(known)
        rstd = convention.rstd(var, self.n)
        return w, y * rstd, rstd, convention.kappa(var, self.n)

    def times_j(self, y: Tensor, transposed: bool = False) -> Tensor:  # [R, columns]
        """J y, or J^T y."""
        return _matmul_t(self.j.T if transposed else self.j, y.T, self.dtype)


def _backward(h_a: Tensor, weight: Tensor, saved: list[Tensor], spec: Spec, g_terms: tuple, needs: tuple) -> Grads:
    t, f, c, *rest = saved
    basis = Basis(*rest)
    n, wide = len(h_a), t.dtype
    features = _Features(basis, weight, n, spec)
    w_on, w_off = (
        w if isinstance(w, Tensor) else c.new_zeros(()) for w in Weights(*g_terms, spec.lambd, spec.scale).of_sums()
    )
    w_on, w_off = w_on.to(wide), w_off.to(wide)
    alpha = 2 * w_off / n  # with the factor N of T
    d_of = ((c.to(wide) - 1) * w_on - c.to(wide) * w_off).mul_(2 / n).to(c.dtype)
    j = basis.j
    p = torch.stack([j @ t[1] @ j.T, j.T @ t[0] @ j])  # of both views
    nu = p.diagonal(dim1=1, dim2=2).mean(1) if spec.normalization is not None else p.new_zeros(2)
    p.diagonal(dim1=1, dim2=2).sub_(nu[:, None])
    p, nu = (p * alpha).to(c.dtype), (nu * alpha).to(c.dtype)
    of_weight = torch.empty_like(weight) if needs[2] else None
    of_r = f.new_zeros(f.shape)  # sums of rstd g w^T
    leaving = f.new_zeros(f.shape)  # sums of rstd d y_hat w^T, of the other view's y_hat
    for s in features.slabs():
        w, y, rstd, kappa = features.standardized(s)
        d = d_of[s]
        g = torch.empty_like(y)
        for view in range(2):
            own, other = y[view], y[1 - view]
            part = _matmul_t(p[view], own.T, y.dtype).add_(features.times_j(other, transposed=view == 1).mul_(d))
            if spec.normalization is None:
                g[view] = part
                continue
            k = kappa[view] if isinstance(kappa, Tensor) else kappa
            e = k * (own * part).sum(0) - nu[view] * spec.normalization.remainder(rstd[view, 0])
            torch.addcmul(part, own, e, value=-1, out=g[view]).mul_(rstd[view])
        if of_weight is not None:
            of_weight[s] = (g.flatten(0, 1).T @ features.r.flatten(0, 1)).mul_(n)
        for view in range(2):
            if needs[view]:
                of_r[view] += _matmul_t(g[view], w.T, y.dtype)
                scaled = y[1 - view] * (d if spec.normalization is None else rstd[view] * d)
                leaving[view] += _matmul_t(scaled, w.T, y.dtype)
    of_h = [None, None]
    for view in range(2):
        if needs[view]:
            q, other = basis.q[view], basis.q[1 - view]
            to_own = j if view == 0 else j.T  # Q_own^T Q_other
            out = (alpha * (t[1 - view] @ (to_own.T @ f[view]))) + leaving[view]
            of_h[view] = ((q @ of_r[view] + (other - q @ to_own) @ out) * n**0.5).to(h_a.dtype)
    return of_h[0], of_h[1], of_weight
