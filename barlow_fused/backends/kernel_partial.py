"""The operations on one rank's part of a batch, of a backend of kernels (torch_partial.py says what these are).

Where the time goes, in the products, kernels compute; with global statistics the Gram route's backward pass is the one
fused kernel of the local loss. What is elementwise (statistics, standardising, and elsewhere the normalisation's
backward pass) is PyTorch's: a rank has a P-th of it.

    partial_gram        partial_gram
    partial_correlate   correlate, of standardised features: raw ones can be centred only by their own means
    input_grad          gram_grad; direct_grad, or with several segments gram_grad, without normalisation, whose
                        backward pass needs means over segments, or over samples elsewhere

``triton_partial.py`` and ``cuda_partial.py`` say how their backend launches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .normalized import Normalized
from .passes import Now, Operations
from .torch_partial import KeptView, Result, through_normalization, without_bulk

_ALL = slice(None)


class StatsRows(NamedTuple):
    """Where a backend's kernels read what they know of every feature, in ``stats``; of two rows the first."""

    count: int
    c: int
    mean: int
    rstd: int
    kappa: int
    square: int  # variance * rstd^2


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How a backend launches, and the operations that are made of it."""

    gram_panels: Callable[[Tensor], Tensor]  # X_hat, (N, D) -> K's panels, one row a slice of D
    operations: Operations  # the backend's own
    now: Callable[..., Now]  # where they run, with tensors like the one given
    plain: Callable[[Tensor, Tensor, Tensor], Normalized]  # of A_hat, B_hat and c, of which nothing more is known
    aligned: Callable[[Tensor], Tensor]  # with rows as the kernels want them
    stats: StatsRows

    def partial_gram(self, view: KeptView) -> tuple[Tensor, Tensor]:
        """K less its bulk."""
        partials = self.gram_panels(view.hat)
        return without_bulk(partials.sum(0) if len(partials) > 1 else partials[0], view)

    def partial_correlate(self, a: KeptView, b: KeptView) -> Tensor:  # [D, D]
        """A_hat^T B_hat over the samples that are here, but for its diagonal, which is 0."""
        n, d = a.z.shape
        x = self.plain(a.hat, b.hat, a.hat.new_zeros(d, dtype=torch.float32))
        now = self.now(a.hat)
        c = now.empty(torch.float32, d, d, row_bytes=self.operations.row_bytes)
        self.operations.correlate(now, x, [now.empty(torch.float32) for _ in range(3)], c)
        return c.contiguous().mul_(n)

    def input_grad(self, views: list[KeptView], view: int, result: Result) -> Tensor:  # [N, D]
        """dL/dz of one view."""
        own = views[view]
        if result.route == "gram" and own.normalization is not None and len(own.segments.sizes) == 1:
            grad = torch.empty_like(own.z)
            self._write_grad(self._normalized(views, result.c), view, result, grad)
            return grad
        grad = torch.empty_like(own.z, dtype=torch.float32)
        self._write_grad(self.plain(views[0].hat, views[1].hat, result.c), view, result, grad)
        return through_normalization(own, view, own.slab(_ALL), grad, result, _ALL).to(own.z.dtype)

    def _write_grad(self, x: Normalized, view: int, result: Result, grad: Tensor) -> None:
        share = x.z_a.shape[0] / result.n  # the kernels divide by the samples that are here
        g_terms = (None, (result.w_on * share).float(), (result.w_off * share).float())
        grads = (None, grad) if view else (grad, None)
        product = self.aligned(result.product.to(x.dtype))
        self.operations.input_grad(self.now(grad), x, product, result.route, g_terms, grads, result.d)

    def _normalized(self, views: list[KeptView], c: Tensor) -> Normalized:
        """Both views in one segment, with all rows of ``stats`` that gram_grad reads."""
        a, b = views
        rows = self.stats
        stats = torch.empty(rows.count, len(c), dtype=torch.float32, device=c.device)
        stats[rows.c] = c
        for index, view in enumerate(views):
            stats[rows.mean + index] = (view.mean - view.shift / view.rstd)[0]
            stats[rows.rstd + index] = view.rstd[0]
            stats[rows.kappa + index] = view.kappa[0]
            stats[rows.square + index] = (view.var * view.rstd.square())[0]
        hats = self.aligned(torch.stack((a.hat, b.hat)))
        return Normalized(a.z, b.z, a.normalization, hats, stats)
