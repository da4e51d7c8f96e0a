"""The hidden route: the loss of z = h W^T without z, for H hidden units that are fewer than N samples.

N samples of H units span H dimensions, in which everything happens. With the thin QR decomposition of the centred
activations, h_x = sqrt(N) Q_x R_x, and J = Q_a^T Q_b, (H, H), a feature with the weight w has

    y_x = R_x w        variance |y_x|^2        y_hat_x = rstd_x y_x        C_ii = y_hat_a^T J y_hat_b

and with T_x = sum of y_hat_x y_hat_x^T over the features, ||C||^2 = <T_a, J T_b J^T>. That is the Gram route with H
samples in place of N: it takes features by slabs, and keeps two (H, H) matrices. A variance is a sum of squares, as
exact as that of z itself; of w^T (h^T h / N) w no digit would be right where w is near the null space of h. For view a
(b: exchange a and b, J and J^T), with alpha = 2 dL/d(off_diag) and d = 2 (C_ii - 1) dL/d(on_diag) - alpha C_ii,

    P_a  = J T_b J^T - nu I                  nu = tr(J T_b J^T) / H: the part of it that the normalisation takes out
    g_a  = rstd_a (alpha P_a y_hat_a + d J y_hat_b - e_a y_hat_a)                                dL/dy_a
    e_a  = kappa_a y_hat_a^T (alpha P_a y_hat_a + d J y_hat_b) - alpha nu (1 - kappa_a |y_hat_a|^2)
    dL/dW   = g_a^T R_a + g_b^T R_b
    dL/dh_a = (Q_a sum g_a w^T  +  (Q_b - Q_a J) sum l_a w^T) / sqrt(N)
    l_a  = rstd_a (alpha T_b J^T y_hat_a + d y_hat_b)

where sums are over the features. The last term is what leaves the span of h_a: nothing where both views are equal.

**Segments.** Where several processes standardise each by their own samples, each has a decomposition of its own: y is
made of theirs, one below the other, J of theirs along its diagonal, and a variance is one segment's. C is the mean over
S segments, so y_hat carries a factor of 1 / sqrt(S). Else S = 1.
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

    q: Tensor  # [2, n, R] of the samples that are here; R = min(N, H)
    r: Tensor  # [2, S, R, H]
    j: Tensor  # [S R, S R] Q_a^T Q_b


class Passes:
    """The forward and the backward pass (backends/operations.py)."""

    def forward(
        self, h_a: Tensor, h_b: Tensor, weight: Tensor, spec: Spec, need_grad: bool, every_term: bool
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The terms, and what the backward pass needs (nothing where no gradient is wanted)."""
        with accelerator.without_autocast(h_a.device.type):
            basis = _basis(h_a, h_b, spec.normalization)
            t, c = Features(basis, weight, (len(h_a),), spec.normalization, spec.chunk).sums()
            wide = c.to(t.dtype)
            on_diag, off_diag = (wide - 1).square().sum(), (norm(t, basis.j) - wide.square().sum()).clamp_min(0)
            terms = BarlowTwinsTerms(spec.scale * (on_diag + spec.lambd * off_diag), on_diag, off_diag)
            terms = BarlowTwinsTerms(*(term.to(c.dtype) for term in terms))
        return terms if every_term else terms[:1], [t, c, *basis] if need_grad else []

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
        t, c, *basis = saved
        with accelerator.without_autocast(h_a.device.type):
            features = Features(Basis(*basis), weight, (len(h_a),), spec.normalization, spec.chunk)
            of_sums = Weights(*g_terms, spec.lambd, spec.scale).of_sums()
            w_on, w_off = ((w if isinstance(w, Tensor) else c.new_zeros(())).to(t.dtype) for w in of_sums)
            sums, of_weight = features.gradients(t, c, w_on, w_off, needs)
            of_h = [features.of_activations(view, sums).to(h_a.dtype) if needs[view] else None for view in range(2)]
        return of_h[0], of_h[1], of_weight

    def empty_saved(
        self, h_a: Tensor, h_b: Tensor, weight: Tensor, route: str, normalization: Normalization | None
    ) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes of what ``forward`` saves."""
        (n, h), d = h_a.shape, len(weight)
        size = min(n, h)
        c = h_a.new_empty(d, dtype=torch.promote_types(h_a.dtype, torch.float32))
        shapes = [(2, size, size), (2, n, size), (2, 1, size, h), (size, size)]
        t, *basis = (h_a.new_empty(shape, dtype=accelerator.widest(c)) for shape in shapes)
        return [t, c, *basis]


def _basis(h_a: Tensor, h_b: Tensor, normalization: Normalization | None) -> Basis:
    h = activations(h_a, h_b, normalization is not None)
    h = h.to(accelerator.widest(h))
    if normalization is not None:
        h = h - h.mean(1, keepdim=True)
    q, r = decompose(h, len(h_a))
    return Basis(q, r[:, None], q[0].mT @ q[1])


def decompose(h: Tensor, n: int) -> tuple[Tensor, Tensor]:  # [2, n, H] -> [2, n, R], [2, R, H]
    """Q and R of both views, h = sqrt(n) Q R."""
    q, r = torch.linalg.qr(h / n**0.5)
    return q.contiguous(), r.contiguous()  # as torch.compile is told


def norm(t: Tensor, j: Tensor) -> Tensor:  # [2, R, R], [R, R] -> []
    """||C||^2, of which the diagonal is part."""
    return (t[0] * (j @ t[1] @ j.T)).sum()


class Features:
    """Features by their weights, [D, H], a slab at a time: the sums over them, and their gradients.

    In the coordinates of the basis, and in the dtype that everything else is computed in.
    """

    def __init__(
        self, basis: Basis, weight: Tensor, counts: tuple[int, ...], normalization: Normalization | None, chunk: int
    ) -> None:
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.basis, self.weight, self.counts = basis, weight, counts
        self.normalization, self.chunk = normalization, chunk
        self.r, self.j = basis.r.to(self.dtype), basis.j.to(self.dtype)
        self.least = basis.r.square().sum((2, 3)).mul_((4 * torch.finfo(self.dtype).eps) ** 2).to(self.dtype)

    def slabs(self) -> Iterator[slice]:
        """As many features at a time as caches hold, or memory should."""
        on_cpu = self.weight.device.type == "cpu"
        elements = SLAB_ELEMENTS if on_cpu else SLAB_BYTES // self.dtype.itemsize
        step = self.chunk or max(256, elements // (2 * len(self.j)))
        return (slice(start, start + step) for start in range(0, len(self.weight), step))

    def standardized(self, s: slice) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """w, [columns, H]; y_hat, [2, S R, columns]; of each segment plain rstd, rstd and kappa, each [2, columns]."""
        w = self.weight[s].to(self.dtype).contiguous()
        y = _matmul_t(self.r.flatten(0, 2), w, self.dtype).view(*self.r.shape[:3], len(w))  # (2, S, R, columns)
        convention, share = self.normalization, 1 / len(self.counts)
        of_segments = []
        if convention is not None:
            norms = w.square().sum(1)
            for segment, n in enumerate(self.counts):
                own = y[:, segment]
                var = own.square().sum(1)
                known = var > self.least[:, segment, None] * norms  # or rounding made it, which rstd would enlarge
                own *= known[:, None]
                var *= known
                plain = convention.rstd(var, n)
                rstd = plain * share**0.5
                own *= rstd[:, None]
                kappa = convention.kappa(var, n)
                kappa = kappa if isinstance(kappa, Tensor) else torch.full_like(var, kappa)
                of_segments.append((plain, rstd, kappa / share))
        return w, y.view(2, -1, len(w)), of_segments

    def times_j(self, y: Tensor, transposed: bool = False) -> Tensor:  # [S R, columns]
        """J y, or J^T y."""
        return _matmul_t(self.j.T if transposed else self.j, y.T, self.dtype)

    def scaled(self, view: int, x: Tensor, of_segments: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """x times rstd of a view."""
        if not of_segments:
            return x
        parts = zip(x.view(len(of_segments), -1, x.shape[1]), of_segments, strict=True)
        return torch.cat([part * rstd[view] for part, (_, rstd, _) in parts])

    def sums(self) -> tuple[Tensor, Tensor]:
        """T, [2, S R, S R], and diag(C), [D]."""
        t = self.basis.j.new_zeros(2, *self.j.shape)
        c = self.r.new_empty(len(self.weight))
        for s in self.slabs():
            _, y, _ = self.standardized(s)
            c[s] = (y[0] * self.times_j(y[1])).sum(0)
            for view in range(2):
                t[view] += _matmul_t(y[view], y[view], y.dtype)
        return t, c

    def gradients(
        self, t: Tensor, c: Tensor, w_on: Tensor, w_off: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor | None]:
        """The sums of g w^T and of l w^T, [2, 2, S R, H] by sum and view; and dL/dW."""
        wide, j = t.dtype, self.basis.j
        d_of = ((c.to(wide) - 1) * w_on - c.to(wide) * w_off).mul_(2).to(self.dtype)
        leaves = torch.stack([t[1] @ j.T, t[0] @ j])  # of both views
        p = torch.stack([j @ leaves[0], j.T @ leaves[1]])
        count = len(self.counts)
        nu = p.new_zeros(2, count)
        if self.normalization is not None:
            diagonals = p.diagonal(dim1=1, dim2=2)
            nu = diagonals.reshape(2, count, -1).mean(2)
            diagonals.sub_(nu.repeat_interleave(len(j) // count, 1))
        p, nu, leaves = ((x * (2 * w_off)).to(self.dtype) for x in (p, nu, leaves))
        of_weight = torch.empty_like(self.weight) if needs[2] else None
        sums = t.new_zeros(2, 2, len(j), self.weight.shape[1])
        for s in self.slabs():
            w, y, of_segments = self.standardized(s)
            d = d_of[s]
            g = torch.empty_like(y)
            for view in range(2):
                part = _matmul_t(p[view], y[view].T, y.dtype).add_(self.times_j(y[1 - view], view == 1).mul_(d))
                g[view] = self._through_normalization(view, y[view], part, of_segments, nu[view])
            if of_weight is not None:
                of_weight[s] = g.flatten(0, 1).T @ self.r.flatten(0, 2)
            for view in range(2):
                if needs[view]:
                    sums[0, view] += _matmul_t(g[view], w.T, y.dtype)
                    leaving = torch.addcmul(_matmul_t(leaves[view], y[view].T, y.dtype), y[1 - view], d)
                    sums[1, view] += _matmul_t(self.scaled(view, leaving, of_segments), w.T, y.dtype)
        return sums, of_weight

    def _through_normalization(
        self, view: int, y: Tensor, part: Tensor, of_segments: list[tuple[Tensor, Tensor, Tensor]], nu: Tensor
    ) -> Tensor:
        if not of_segments:
            return part
        shape = (len(of_segments), -1, y.shape[1])
        for own, g, (plain, rstd, kappa), bulk in zip(y.view(shape), part.view(shape), of_segments, nu, strict=True):
            e = kappa[view] * (own * g).sum(0) - bulk * self.normalization.remainder(plain[view])
            g.addcmul_(own, e, value=-1).mul_(rstd[view])
        return part

    def of_activations(self, view: int, sums: Tensor, segment: int = 0) -> Tensor:  # [n, H]
        """dL/dh of one view's samples that are here, which are of one segment."""
        j, q = self.basis.j, self.basis.q
        to_own = j if view == 0 else j.T  # Q_own^T Q_other
        size = q.shape[2]
        rows = slice(segment * size, (segment + 1) * size)
        within, leaving = sums[0, view, rows], sums[1, view, rows]
        grad = q[view] @ (within - to_own[rows, rows] @ leaving) + q[1 - view] @ leaving
        return grad * self.counts[segment] ** -0.5
