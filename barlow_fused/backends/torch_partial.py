"""The torch backend's operations on one rank's part of a batch: what distributed/ is composed of.

A backend that can work over several processes has such a file, ``<name>_partial.py``, beside its four operations, with
what is listed here. The backends of kernels have their own View, partial_gram, partial_correlate and input_grad, which
take nearly all of the time (kernel_partial.py), and share the rest.

A part is either all samples of some features (Gram route) or all features of some samples (direct route). Sums that go
over the ranks are left undivided. Operations work on one view at a time where they can, so that the other view can
travel meanwhile:

    moments(z, sizes)                -> [3, S, D]     mean, what rounding left of it, and variance
    View(z, moments, ...)                             a view and what standardises it
    partial_gram(view)               -> panels, tau   K's lower triangle, summed over the features that are here
    join_gram(flats, taus, ...)      -> <K_a, K_b>, product    from the sums over the ranks
    diagonal(a, b)                   -> [D]           A_hat * B_hat, summed over the samples that are here
    partial_correlate(a, b)          -> [D, D]        A_hat^T B_hat, likewise
    input_grad(views, view, result)  -> dL/dz         of one view, given the Result of all ranks

Samples form S segments, each standardised by itself: one with the statistics of the global batch, one a rank with those
of each rank. A segment of n samples may have the weight w, which its standardised features carry as sqrt(w).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..normalization import Normalization
from . import accelerator, torch_whole
from .slabs import _compute_dtype, _cut, _matmul_t, _slabs
from .torch_slabs import PANEL
from .triton_kernels import configs

FLOAT64_SAMPLES = 128  # below this K, which is small then, is summed over slabs and ranks in float64


class Segments(NamedTuple):
    """How the samples of a part are standardised: in S segments."""

    sizes: tuple[int, ...]  # samples of each segment that are here
    counts: tuple[int, ...]  # samples that each segment's statistics are taken over
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a backward pass knows of the whole batch."""

    route: str
    n: int  # samples of all ranks
    d: int  # features of all ranks
    product: Tensor  # Gram: both views' (N, N) matrices, [2, N, N]; direct: C with its diagonal set to 0, [D, D]
    c: Tensor  # [D] diag(C), of the features that are here
    tau: Tensor | None  # [2, S] Gram: the bulk that was taken out of K
    w_on: Tensor  # [] the gradients with respect to the two sums, on_diag and off_diag
    w_off: Tensor

    @functools.cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """alpha, [], and d, [D]: the gradient with respect to A_hat is alpha * P + d * B_hat."""
        if self.route == "gram":
            d = ((self.c - 1) * self.w_on - self.c * self.w_off) * (2 / self.n)
            return self.w_off * (2 * self.d / self.n**2), d
        return self.w_off * (2 / self.n), (self.c - 1) * self.w_on * (2 / self.n)


def for_caches(device: torch.device) -> bool:
    """Whether features are worked on in slabs that caches hold, as on CPUs, or as many at a time as memory allows."""
    return device.type == "cpu"


def _columns(z: Tensor) -> Iterator[slice]:
    """The slabs of features."""
    n, d = max(1, len(z)), z.shape[1]
    return _slabs(d, n) if for_caches(z.device) else torch_whole._chunks(n, d, _compute_dtype(z), arrays=2)


def moments(z: Tensor, sizes: tuple[int, ...]) -> Tensor:  # [N, D] -> [3, S, D]
    """Each feature's mean, what rounding left of it, and biased variance, over each segment of samples."""
    d = z.shape[1]
    result = z.new_empty(3, len(sizes), d, dtype=_compute_dtype(z))
    for s in _columns(z):
        mean, shift, var = _cut(result, s)  # each (S, columns)
        for segment, x in enumerate(z[:, s].to(result.dtype, copy=True).split(sizes)):
            x -= torch.mean(x, 0, out=mean[segment])
            x -= torch.mean(x, 0, out=shift[segment])
            torch.mean(x.square_(), 0, out=var[segment])
    return result


class View:
    """A view and what it takes to standardise it: x_hat = (z - mean) * rstd + shift, sqrt(w) within."""

    def __init__(
        self,
        z: Tensor,  # [N, D]
        moments: Tensor | None,  # [3, S, D]; None: the inputs are used as they are
        normalization: Normalization | None,
        segments: Segments,
    ) -> None:
        self.z = z
        self.dtype = self.product_dtype = _compute_dtype(z)  # product_dtype: of K in the backward pass
        self.normalization = normalization
        self.segments = segments
        if moments is None:
            return
        self.moments = moments
        self.mean, residual, self.var = moments.unbind()  # (S, D) each
        parts = list(zip(self.var, segments.counts, segments.weights, strict=True))
        self.plain_rstd = torch.stack([normalization.rstd(var, n) for var, n, _ in parts])
        self.rstd = self.plain_rstd * self._per_segment([w**0.5 for w in segments.weights])
        self.shift = -residual * self.rstd

    def _per_segment(self, values: list[float]) -> Tensor:  # [S, 1]
        return numbers(values, self.dtype, self.z.device)[:, None]

    def slab(self, columns: slice) -> Tensor:  # [N, columns]
        """Standardised features, in the dtype that everything is computed in."""
        x = self.z[:, columns].to(self.dtype, copy=True)
        if self.normalization is None:
            return x
        mean, shift, rstd = (self.rows(_cut(t, columns)) for t in (self.mean, self.shift, self.rstd))
        return torch.addcmul(shift, x.sub_(mean), rstd, out=x)

    def rows(self, per_segment: Tensor) -> Tensor:  # [S, D] -> [1, D] or [N, D]
        """Numbers of a segment, for each of its samples."""
        return per_segment if len(self.segments.sizes) == 1 else per_segment.index_select(0, self._segment_of_row)

    def means(self, x: Tensor) -> Tensor:  # [N, D] -> [S, D]
        """The mean over each segment's samples."""
        return torch.stack([part.mean(0) for part in x.split(self.segments.sizes)])

    @functools.cached_property
    def _segment_of_row(self) -> Tensor:  # [N]
        return _segment_of_row(self.segments.sizes, self.z.device)

    @functools.cached_property
    def kappa(self) -> Tensor:  # [S, D] or [S, 1]
        """The weight of the variance's part in the gradient (normalization.py), over w."""
        parts = zip(self.var, self.segments.counts, self.segments.weights, strict=True)
        kappas = [
            kappa / w if isinstance(kappa, Tensor) else var.new_full((1,), kappa / w)
            for var, w, kappa in ((var, w, self.normalization.kappa(var, n)) for var, n, w in parts)
        ]
        return torch.stack(kappas).reshape(len(kappas), -1)

    @functools.cached_property
    def power(self) -> Tensor:  # [S, D]
        """How much each feature has of K's bulk."""
        counts = self._per_segment([n / (n - 1) for n in self.segments.counts])
        return (self.var * self.rstd.square()).mul_(counts)


class KeptView(View):
    """A view whose standardised features are kept, in the dtype that a GPU's kernels multiply."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.product_dtype = configs.compute_dtype(*self.z.shape, self.z.dtype, self.normalization is not None)

    @functools.cached_property
    def hat(self) -> Tensor:  # [N, D]
        return self.slab(slice(None)).to(self.product_dtype)


def partial_gram(view: View) -> tuple[Tensor, Tensor]:
    """K = X_hat X_hat^T less its bulk (torch_slabs._bulk), summed over the features that are here; N^2 D FLOPs.

    Returns the lower triangle's panels, flat, and tau, (S,) float64: the bulk tau_s I that was taken out of each
    segment's diagonal block; zero without a normalisation.
    """
    n = len(view.z)
    flat = view.z.new_zeros(sum(panel_sizes(n)), dtype=view.dtype)
    wide = accelerator.widest(flat)
    flat = flat.to(wide if n < FLOAT64_SAMPLES else view.dtype)
    diagonal = flat.new_zeros(n)
    tau = flat.new_zeros(len(view.segments.sizes), dtype=wide)
    standardizes = view.normalization is not None
    for s in _columns(view.z):
        x_hat = view.slab(s)
        for start, stop, panel in panels(flat, n):
            panel += _matmul_t(x_hat[start:stop], x_hat[:stop], view.z.dtype)
        if standardizes:
            power = _cut(view.power, s)
            diagonal += x_hat.square_().sub_(view.rows(power)).sum(1)
            tau += power.sum(1, dtype=wide)
    if standardizes:
        for start, stop, panel in panels(flat, n):
            panel.diagonal(start).copy_(diagonal[start:stop])
    return flat, tau


def without_bulk(flat: Tensor, view: KeptView) -> tuple[Tensor, Tensor]:
    """partial_gram's results, from K's panels: the bulk is w D of a segment with the weight w, its diagonal's mean."""
    n, d = view.z.shape
    bulk = [0.0 if view.normalization is None else weight * d for weight in view.segments.weights]
    tau = numbers(bulk, accelerator.widest(flat), flat.device)
    if view.normalization is not None:
        of_rows = view.rows(tau[:, None].to(flat.dtype)).expand(n, 1)[:, 0]
        for start, stop, panel in panels(flat, n):
            panel.diagonal(start).sub_(of_rows[start:stop])
    return flat, tau


def panel_sizes(n: int) -> list[int]:
    """Elements of the panels of PANEL rows that hold the lower triangle of an (n, n) matrix."""
    return [(min(start + PANEL, n) - start) * min(start + PANEL, n) for start in range(0, n, PANEL)]


def panels(flat: Tensor, n: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, the panel of rows start:stop and columns :stop)."""
    for start, panel in zip(range(0, n, PANEL), flat.split(panel_sizes(n)), strict=True):
        stop = min(start + PANEL, n)
        yield start, stop, panel.view(stop - start, stop)


def join_gram(
    flats: tuple[Tensor, Tensor],  # panels of K_a and K_b, summed over the ranks
    taus: Tensor,  # [2, S], summed over the ranks
    sizes: tuple[int, ...],  # of the segments
    total_d: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """<K_a, K_b> in the widest dtype, and the backward pass's product, (2, N, N): (K - tau_s (I - 1 1^T / n_s)) / D."""
    n = sum(sizes)
    product = flats[0].new_empty(2, n, n, dtype=dtype)
    segment = _segment_of_row(sizes, product.device)
    means = (taus / numbers(sizes, taus.dtype, taus.device)).to(flats[0].dtype)[:, segment]  # (2, N)
    inner, wide = 0.0, accelerator.widest(flats[0])
    for start, k_a, k_b in _pairs(flats, n):
        stop = start + len(k_a)
        inner = inner + 2 * (k_a[:, :start] * k_b[:, :start]).sum(dtype=wide)
        inner = inner + (k_a[:, start:] * k_b[:, start:]).sum(dtype=wide)
        own = segment[start:stop, None] == segment[:stop]
        for k, panel, mean in zip(product, (k_a, k_b), means, strict=True):
            rest = (panel + own * mean[start:stop, None]).div_(total_d)  # and only then rounded
            k[start:stop, :stop] = rest
            k[:start, start:stop] = rest[:, :start].T
    start = 0
    diagonals = torch.cat([torch.stack([k.diagonal(s) for k in ks]) for s, *ks in _pairs(flats, n)], 1).to(wide)
    for segment, size in enumerate(sizes):
        rows = slice(start, start + size)
        tau = taus[:, segment]
        inner = inner + torch.dot(diagonals[:, rows].sum(1), tau.flip(0)) + size * tau.prod()
        start += size
    return inner, product


def numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of them. Where they are all the same nothing is copied from the host, which would wait for it."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, device=device)


def _segment_of_row(sizes: tuple[int, ...], device: torch.device) -> Tensor:  # [N]
    if len(sizes) == 1:
        return torch.zeros(sizes[0], dtype=torch.int64, device=device)
    segments = torch.arange(len(sizes), device=device)
    return segments.repeat_interleave(numbers(sizes, torch.int64, device), output_size=sum(sizes))


def _pairs(flats: tuple[Tensor, Tensor], n: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    for (start, _, k_a), (_, _, k_b) in zip(*(panels(flat, n) for flat in flats), strict=True):
        yield start, k_a, k_b


def diagonal(a: View, b: View) -> Tensor:  # [D]
    """The sum over the samples that are here of A_hat * B_hat."""
    return torch.cat([(a.slab(s) * b.slab(s)).sum(0) for s in _columns(a.z)])


def partial_correlate(a: View, b: View) -> Tensor:  # [D, D]
    """A_hat^T B_hat over the samples that are here; 2 N D^2 FLOPs."""
    return _matmul_t(a.slab(slice(None)).T, b.slab(slice(None)).T, a.z.dtype)


def input_grad(views: list[View], view: int, result: Result) -> Tensor:  # [N, D]
    """dL/dz of one view, from the two parts of g = dL/dX_hat = alpha * P + d * other."""
    own, other = views[view], views[1 - view]
    alpha, d = result.factors
    gram = result.route == "gram"
    product = result.product[1 - view] if gram else result.product.T if view else result.product
    grad = torch.empty_like(own.z)
    for s in _columns(own.z) if gram else (slice(None),):
        x, y = own.slab(s), other.slab(s)
        g = _matmul_t(product, x.T, own.z.dtype) if gram else _matmul_t(y, product, own.z.dtype)
        g = g.mul_(alpha).addcmul_(y, _cut(d, s))
        grad[:, s] = through_normalization(own, view, x, g, result, s)
    return grad


def through_normalization(
    own: View,
    view: int,
    x: Tensor,  # [N, columns] X_hat
    g: Tensor,  # [N, columns] dL/dX_hat, less what K's bulk makes of it; written over
    result: Result,
    columns: slice,
    mean: Tensor | None = None,  # [S, columns] mean_n(X_hat * g), if known
) -> Tensor:  # [N, columns]
    """dL/dz = rstd * (g - kappa * mean_n(X_hat * g) * X_hat), and what the normalisation leaves of the bulk."""
    if own.normalization is None:
        return g
    alpha, d = result.factors
    product = result.product
    if mean is not None:
        pass
    elif sum(own.segments.counts) == len(x):
        mean = own.means(x * g)
    else:  # over samples that are not all here, from C
        mean = (torch.linalg.vecdot(product, product, dim=1 - view) * alpha + d * result.c)[None, columns]
    factor = _cut(own.kappa.expand_as(own.var), columns) * mean
    if result.tau is not None:  # of the other view; zero where none was taken
        bulk = (alpha * result.tau[1 - view] / result.d).to(factor)[:, None]
        factor -= own.normalization.remainder(_cut(own.plain_rstd, columns)) * bulk
    return g.addcmul_(x, own.rows(factor), value=-1).mul_(own.rows(_cut(own.rstd, columns)))
