"""The loss with the last layer on accelerators, and by backends of kernels: chunks of features.

Gram route: a chunk of z is what a rank has that holds these features of all samples (backends/torch_partial.py), so
each backend's kernels for one rank's part do the work, and what is summed over ranks there is summed over chunks here.
z of a chunk is made by the library, in the dtype that ``nn.Linear`` would give it, in both passes.

Direct route: it is taken where N > D/2, so that z is no larger than the (D, D) matrix or the batch's (N, N): z is made
whole, and the backend's own passes do the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backends
from ..backends import accelerator
from ..backends.operations import Spec, Weights
from ..backends.operations import passes as passes_of
from ..backends.torch_partial import KeptView, Result, Segments
from ..normalization import Normalization
from ..reference import BarlowTwinsTerms
from .slabs import Grads

CHUNK_BYTES = 2**27  # of both views' z of a chunk, in the dtype that everything is computed in
ALIGNMENT = 256  # features


class Passes:
    """The forward and the backward pass (backends/operations.py)."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def forward(
        self, h_a: Tensor, h_b: Tensor, weight: Tensor, spec: Spec, need_grad: bool, every_term: bool
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The terms, and what the backward pass needs (nothing where no gradient is wanted)."""
        with accelerator.without_autocast(h_a.device.type):
            if spec.route == "direct":
                whole = self._of_whole(h_a)
                return whole.forward(_embed(h_a, weight), _embed(h_b, weight), spec, need_grad, every_term)
            terms, saved = self._gram(h_a, h_b, weight, spec)
        return terms if every_term else terms[:1], saved if need_grad else []

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
            sums = _Sums(h_a, h_b, weight, needs)
            if spec.route == "direct":
                of_views = needs[0] or needs[2], needs[1] or needs[2]
                z = _embed(h_a, weight), _embed(h_b, weight)
                grads = self._of_whole(h_a).backward(*z, saved, spec, g_terms, of_views)
                sums.add(slice(None), weight, grads)
                return sums.result()
            c, product, tau, *moments = saved
            wide = accelerator.widest(c)
            w_on, w_off = (
                (w if isinstance(w, Tensor) else c.new_zeros(())).to(wide)
                for w in Weights(*g_terms, spec.lambd, spec.scale).of_sums()
            )
            ops = backends.load_partial(self._backend)
            for s in _chunks(h_a, weight, spec):
                w = weight[s]
                views = [
                    self._view(_embed(h, w), m[:, :, s] if moments else None, spec)
                    for h, m in zip((h_a, h_b), moments or (None, None), strict=True)
                ]
                result = Result("gram", len(h_a), len(weight), product, c[s], tau, w_on, w_off)
                wanted = (view for view in range(2) if needs[view] or needs[2])
                grads = {view: ops.input_grad(views, view, result) for view in wanted}
                sums.add(s, w, [grads.get(view) for view in range(2)])
            return sums.result()

    def empty_saved(
        self, h_a: Tensor, h_b: Tensor, weight: Tensor, route: str, normalization: Normalization | None
    ) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes of what ``forward`` saves."""
        n, d = len(h_a), len(weight)
        if route == "direct":
            return self._of_whole(h_a).empty_saved(h_a.new_empty(n, d), route, normalization)
        c = h_a.new_empty(d, dtype=torch.promote_types(h_a.dtype, torch.float32))
        moments = [] if normalization is None else [c.new_empty(3, 1, d) for _ in range(2)]
        product = c.new_empty(2, n, n, dtype=self._product_dtype(h_a, d, normalization))
        return [c, product, c.new_empty(2, 1, dtype=torch.float64), *moments]

    def _of_whole(self, h: Tensor) -> object:
        return passes_of(backends.load(self._backend, h.device))

    def _gram(self, h_a: Tensor, h_b: Tensor, weight: Tensor, spec: Spec) -> tuple[BarlowTwinsTerms, list[Tensor]]:
        ops = backends.load_partial(self._backend)
        n, d = len(h_a), len(weight)
        c = h_a.new_empty(d, dtype=torch.promote_types(h_a.dtype, torch.float32))
        all_moments = [] if spec.normalization is None else [c.new_empty(3, 1, d) for _ in range(2)]
        flats, taus = [None, None], [0.0, 0.0]
        for s in _chunks(h_a, weight, spec):
            views = []
            for view, h in enumerate((h_a, h_b)):
                z, moments = _embed(h, weight[s]), None
                if all_moments:
                    moments = all_moments[view][:, :, s]
                    moments.copy_(ops.moments(z, (n,)))
                views.append(self._view(z, moments, spec))
                flat, tau = ops.partial_gram(views[-1])
                flats[view] = flat if flats[view] is None else flats[view].add_(flat)
                taus[view] = taus[view] + tau
            c[s] = ops.diagonal(*views).div_(n)
        wide = c.to(accelerator.widest(c))
        tau = torch.stack(taus)
        dtype = self._product_dtype(h_a, d, spec.normalization)
        inner, product = ops.join_gram(tuple(flats), tau, (n,), d, dtype)
        on_diag, off_diag = (wide - 1).square().sum(), (inner / n**2 - wide.square().sum()).clamp_min(0)
        terms = BarlowTwinsTerms(spec.scale * (on_diag + spec.lambd * off_diag), on_diag, off_diag)
        return BarlowTwinsTerms(*(t.to(c.dtype) for t in terms)), [c, product, tau, *all_moments]

    def _view(self, z: Tensor, moments: Tensor | None, spec: Spec) -> object:
        n = len(z)
        ops = backends.load_partial(self._backend)
        return ops.View(z, moments, spec.normalization, Segments((n,), (n,), (1.0,)))

    def _product_dtype(self, h: Tensor, d: int, normalization: Normalization | None) -> torch.dtype:
        """Of K in the backward pass: what a view of all features multiplies."""
        like = h.new_empty(len(h), d, device="meta")
        view = backends.load_partial(self._backend).View
        if issubclass(view, KeptView):
            moments = None if normalization is None else like.new_empty(3, 1, d)
            return view(like, moments, normalization, Segments((len(h),), (len(h),), (1.0,))).product_dtype
        return torch.promote_types(h.dtype, torch.float32)


class _Sums:
    """The gradients of the activations, summed over chunks, and of the weight, a chunk at a time."""

    def __init__(self, h_a: Tensor, h_b: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> None:
        self._h, self._weight, self._needs = (h_a, h_b), weight, needs
        self._of_weight = torch.empty_like(weight) if needs[2] else None
        self._of_h: list[Tensor | None] = [None, None]

    def add(self, columns: slice, weight: Tensor, grads: list[Tensor | None]) -> None:
        """What dL/dz of a chunk's features adds."""
        if self._of_weight is not None:
            parts = (accelerator.matmul(grad.T, h) for grad, h in zip(grads, self._h, strict=True))
            self._of_weight[columns] = next(parts).add_(next(parts))
        for view in range(2):
            if self._needs[view]:
                part, total = accelerator.matmul(grads[view], weight), self._of_h[view]
                self._of_h[view] = part if total is None else total.add_(part)

    def result(self) -> Grads:
        """The gradients, in the dtypes of what they belong to."""
        of_h = [None if g is None else g.to(h.dtype) for g, h in zip(self._of_h, self._h, strict=True)]
        return of_h[0], of_h[1], self._of_weight


def _embed(h: Tensor, weight: Tensor) -> Tensor:  # [N, H], [columns, H] -> [N, columns]
    return h @ weight.T


def _chunks(h: Tensor, weight: Tensor, spec: Spec) -> Iterator[slice]:
    n, d = len(h), len(weight)
    size = torch.promote_types(h.dtype, torch.float32).itemsize
    step = spec.chunk or max(ALIGNMENT, CHUNK_BYTES // (2 * n * size) // ALIGNMENT * ALIGNMENT)
    return (slice(start, min(start + step, d)) for start in range(0, d, step))
