"""The loss with the last layer on accelerators, and by backends of kernels: chunks of features.

Gram route: a chunk of z is what a rank has that holds these features of all samples (backends/torch_partial.py), so
each backend's kernels for one rank's part do the work, and what is summed over ranks there is summed over chunks here.
z of a chunk is made by the library, in the dtype that ``nn.Linear`` would give it, in both passes.

Direct route: it is taken where N > D/2, so that z is no larger than the (D, D) matrix or the batch's (N, N): z is made
whole, and the backend's own passes do the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import ModuleType

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

CHUNK_BYTES = 2**27  # on accelerators, of both views' z of a chunk, in the dtype that everything is computed in
CPU_CHUNK_BYTES = 2**24  # on CPUs: a few slabs of the backend's
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
            sums = Sums(h_a, h_b, weight, needs)
            if spec.route == "direct":
                of_views = needs[0] or needs[2], needs[1] or needs[2]
                z = _embed(h_a, weight), _embed(h_b, weight)
                grads = self._of_whole(h_a).backward(*z, saved, spec, g_terms, of_views)
                sums.add(slice(None), weight, grads)
                return sums.result()
            c, product, tau, *moments = saved
            of_sums = Weights(*g_terms, spec.lambd, spec.scale).of_sums()
            w_on, w_off = ((w if isinstance(w, Tensor) else c.new_zeros(())).to(accelerator.widest(c)) for w in of_sums)
            result = Result("gram", len(h_a), len(weight), product, c, tau, w_on, w_off)
            self._chunks(h_a, h_b, weight, spec).gradients(moments, result, sums)
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
        return [c, product, c.new_empty(2, 1, dtype=accelerator.widest(c)), *moments]

    def _of_whole(self, h: Tensor) -> object:
        return passes_of(backends.load(self._backend, h.device))

    def _gram(self, h_a: Tensor, h_b: Tensor, weight: Tensor, spec: Spec) -> tuple[BarlowTwinsTerms, list[Tensor]]:
        n, d = len(h_a), len(weight)
        flats, taus, c, moments = self._chunks(h_a, h_b, weight, spec).sums()
        wide = c.to(accelerator.widest(c))
        tau = torch.stack(taus)
        dtype = self._product_dtype(h_a, d, spec.normalization)
        inner, product = backends.load_partial(self._backend).join_gram(flats, tau, (n,), d, dtype)
        on_diag, off_diag = (wide - 1).square().sum(), (inner / n**2 - wide.square().sum()).clamp_min(0)
        terms = BarlowTwinsTerms(spec.scale * (on_diag + spec.lambd * off_diag), on_diag, off_diag)
        return BarlowTwinsTerms(*(t.to(c.dtype) for t in terms)), [c, product, tau, *moments]

    def _chunks(self, h_a: Tensor, h_b: Tensor, weight: Tensor, spec: Spec) -> Chunks:
        n = len(h_a)
        ops = backends.load_partial(self._backend)
        return Chunks((h_a, h_b), weight, ops, spec.normalization, Segments((n,), (n,), (1.0,)), spec.chunk)

    def _product_dtype(self, h: Tensor, d: int, normalization: Normalization | None) -> torch.dtype:
        return product_dtype(h, d, backends.load_partial(self._backend), normalization)


class Chunks:
    """The Gram route's sums over features, a chunk at a time, and their gradients."""

    def __init__(
        self,
        h: tuple[Tensor, Tensor],  # [N, H] both views' activations of all samples
        weight: Tensor,  # [D', H] of the features that are here
        ops: ModuleType,  # a backend's, on a part of a batch
        normalization: Normalization | None,
        segments: Segments,
        step: int,  # features of a chunk; 0: what memory should hold
    ) -> None:
        self._h, self._weight, self._ops, self._step = h, weight, ops, step
        self._normalization, self._segments = normalization, segments

    def sums(self) -> tuple[tuple[Tensor, Tensor], list[Tensor], Tensor, list[Tensor]]:
        """Of both views K's panels and tau (backends/torch_partial.py); diag(C), and both views' moments."""
        n, d, count = len(self._h[0]), len(self._weight), len(self._segments.sizes)
        c = self._h[0].new_empty(d, dtype=torch.promote_types(self._weight.dtype, torch.float32))
        moments = [] if self._normalization is None else [c.new_empty(3, count, d) for _ in range(2)]
        flats, taus = [None, None], [0.0, 0.0]
        for s in self._slices():
            views = []
            for view, h in enumerate(self._h):
                z = _embed(h, self._weight[s])
                if moments:
                    moments[view][:, :, s] = self._ops.moments(z, self._segments.sizes)
                views.append(self._view(z, view, s, moments))
                flat, tau = self._ops.partial_gram(views[view])
                flats[view] = flat if flats[view] is None else flats[view].add_(flat)
                taus[view] = taus[view] + tau
            c[s] = self._ops.diagonal(*views).div_(n)
        return tuple(flats), taus, c, moments

    def gradients(self, moments: list[Tensor], result: Result, sums: Sums) -> None:
        """Adds to ``sums`` what these features have of the gradients; diag(C) in ``result`` is theirs."""
        for s in self._slices():
            views = [self._view(_embed(h, self._weight[s]), view, s, moments) for view, h in enumerate(self._h)]
            of_chunk = dataclasses.replace(result, c=result.c[s])
            grads = [self._ops.input_grad(views, view, of_chunk) if sums.of_view(view) else None for view in range(2)]
            sums.add(s, self._weight[s], grads)

    def _view(self, z: Tensor, view: int, s: slice, moments: list[Tensor]) -> object:
        return self._ops.View(z, moments[view][:, :, s] if moments else None, self._normalization, self._segments)

    def _slices(self) -> Iterator[slice]:
        (n, h), d = self._h[0].shape, len(self._weight)
        size = torch.promote_types(self._weight.dtype, torch.float32).itemsize
        budget = CPU_CHUNK_BYTES if self._weight.device.type == "cpu" else CHUNK_BYTES
        step = self._step or max(ALIGNMENT, budget // (2 * max(n, h) * size) // ALIGNMENT * ALIGNMENT)
        return (slice(start, min(start + step, d)) for start in range(0, max(d, 1), step))


def product_dtype(h: Tensor, d: int, ops: ModuleType, normalization: Normalization | None) -> torch.dtype:
    """Of K in the backward pass: what a view of all features multiplies."""
    like = h.new_empty(len(h), d, device="meta")
    if issubclass(ops.View, KeptView):
        moments = None if normalization is None else like.new_empty(3, 1, d)
        return ops.View(like, moments, normalization, Segments((len(h),), (len(h),), (1.0,))).product_dtype
    return torch.promote_types(h.dtype, torch.float32)


class Sums:
    """The gradients of the activations, summed over chunks, and of the weight, a chunk at a time."""

    def __init__(self, h_a: Tensor, h_b: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> None:
        self._h, self._weight, self._needs = (h_a, h_b), weight, needs
        self.of_weight = torch.empty_like(weight) if needs[2] else None
        self.of_h: list[Tensor | None] = [None, None]  # [N, H] each

    def of_view(self, view: int) -> bool:
        """Whether dL/dz of a view is asked for."""
        return self._needs[view] or self._needs[2]

    def add(self, columns: slice, weight: Tensor, grads: list[Tensor | None]) -> None:
        """What dL/dz of a chunk's features adds."""
        if self.of_weight is not None:
            parts = (accelerator.matmul(grad.T, h) for grad, h in zip(grads, self._h, strict=True))
            self.of_weight[columns] = next(parts).add_(next(parts))
        for view in range(2):
            if self._needs[view]:
                part, total = accelerator.matmul(grads[view], weight), self.of_h[view]
                self.of_h[view] = part if total is None else total.add_(part)

    def result(self) -> Grads:
        """The gradients, in the dtypes of what they belong to."""
        of_h = [None if g is None else g.to(h.dtype) for g, h in zip(self.of_h, self._h, strict=True)]
        return of_h[0], of_h[1], self.of_weight


def _embed(h: Tensor, weight: Tensor) -> Tensor:  # [N, H], [columns, H] -> [N, columns]
    return h @ weight.T
