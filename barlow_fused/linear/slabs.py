"""The loss with the last layer on CPUs: the torch backend's slabs, made of the hidden activations.

The Gram route makes z of some features for all samples, the direct route of all features for some samples. Each is one
product for both views. The gradient of a slab becomes its part of the weight's and the activations' gradients at once,
by two products more. So z is made twice, once a pass: 16 N H D FLOPs in place of 12, beside the loss's own.

Where features are standardised, the activations are centred first. Then so is z, but for rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import torch_direct, torch_slabs
from ..backends.accelerator import without_autocast
from ..backends.operations import Spec, Weights, tensor
from ..backends.slabs import _ALL, Gradients, Normalized, _compute_dtype, _matmul_t, _slabs
from ..normalization import Normalization

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]  # with respect to h_a, h_b and the weight


class Passes:
    """The forward and the backward pass (backends/operations.py)."""

    def forward(
        self, h_a: Tensor, h_b: Tensor, weight: Tensor, spec: Spec, need_grad: bool, every_term: bool
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The terms, and what the backward pass needs (nothing where no gradient is wanted)."""
        with without_autocast("cpu"):
            x = _last_layer(h_a, h_b, weight, spec)
            reduce = torch_slabs.gram if spec.route == "gram" else torch_slabs.correlate
            terms, product = reduce(x, spec.lambd, spec.scale, need_grad)
        terms = tuple(tensor(term, h_a) for term in (terms if every_term else terms[:1]))
        return terms, [product, *x.saved()] if need_grad else []

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
        product, c, *stats = saved
        with without_autocast("cpu"):
            x = _last_layer(h_a, h_b, weight, spec, needs)
            x.c, x.stats = c, tuple(stats)
            of_views = needs[0] or needs[2], needs[1] or needs[2]
            return torch_slabs.input_grad(x, product, spec.route, Weights(*g_terms, spec.lambd, spec.scale), of_views)

    def empty_saved(
        self, h_a: Tensor, h_b: Tensor, weight: Tensor, route: str, normalization: Normalization | None
    ) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes of what ``forward`` saves."""
        n, d = len(h_a), len(weight)
        c = h_a.new_empty(d, dtype=_compute_dtype(h_a))
        saved = [c.new_empty((2, n, n) if route == "gram" else (d, d)), c]
        if normalization is not None:
            gram = [c.new_empty(2, 1, d) for _ in range(4)]
            saved += gram if route == "gram" else torch_direct.empty_stats(h_a.new_empty(n, d))
        return saved


class Embeddings(NamedTuple):
    """What z is asked for, but for its numbers."""

    like: Tensor
    shape: tuple[int, int]  # (N, D)

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations."""
        return self.like.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def new_empty(self, *size: int, dtype: torch.dtype) -> Tensor:
        """A tensor on the activations' device."""
        return self.like.new_empty(*size, dtype=dtype)


@dataclasses.dataclass
class LastLayer(Normalized):
    """Two views that are made of activations and a weight."""

    h: Tensor | None = None  # [2, N, H] in the dtype that everything is computed in, centred where z is standardised
    weight: Tensor | None = None  # [D, H]
    chunk: int = 0  # features of a slab of the Gram route; 0: what caches hold
    needs: tuple[bool, bool, bool] = (False, False, False)  # which gradients are wanted, of h_a, h_b and the weight
    made = True

    def rows_of_weight(self, columns: slice) -> Tensor:  # [columns, H]
        """A slab's weight, in the dtype that everything is computed in."""
        return self.weight[columns].to(self.h.dtype).contiguous()

    def slab(self, rows: slice, columns: slice, less: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Some samples or features of both views, [2, rows, columns]."""
        h = self.h[:, rows]
        return _matmul_t(h.reshape(-1, h.shape[2]), self.rows_of_weight(columns), h.dtype).view(2, h.shape[1], -1)

    def columns(self) -> Iterator[slice]:
        """The slabs of features."""
        n, d = self.z_a.shape
        if not self.chunk:
            return _slabs(d, n)
        return iter([_ALL] if self.chunk >= d else [slice(i, i + self.chunk) for i in range(0, d, self.chunk)])

    def few_means(self, out: Tensor) -> Tensor:
        """Nothing: they are centred."""
        return out.zero_()

    def gradients(self, views: list[int], whole: bool) -> LayerGradients:
        """Where a backward pass puts the slabs of dL/dz."""
        return LayerGradients(self, views)


class LayerGradients(Gradients):
    """dL/dh of both views and dL/dW, put together from slabs of dL/dz."""

    def __init__(self, x: LastLayer, views: list[int]) -> None:
        self._x, self._views = x, slice(views[0], views[-1] + 1)
        self._slab: Tensor | None = None  # [views, rows, columns]
        self._of_h = [torch.zeros_like(x.h[0]) for _ in views]
        self._of_weight: Tensor | None = None

    def room(self, view: int, index: tuple[slice, slice], dtype: torch.dtype) -> Tensor:
        """Where a slab's gradient is written."""
        n, d = self._x.z_a.shape
        shape = len(range(n)[index[0]]), len(range(d)[index[1]])
        if self._slab is None or self._slab.shape[1:] != shape:
            self._slab = self._x.h.new_empty(len(self._of_h), *shape)
        return self._slab[view - self._views.start]

    def put(self, view: int, index: tuple[slice, slice], grad: Tensor, room: Tensor | None) -> None:
        """It is in its room."""

    def end(self, index: tuple[slice, slice]) -> None:
        """The slab's part of the gradients: its rows of dL/dW, or its samples', and what it adds to dL/dh."""
        (rows, columns), x = index, self._x
        grad = self._slab.flatten(0, 1)  # (views * rows, columns)
        if x.needs[2]:
            self._add_to_weight(rows, columns, grad.T, x.h[self._views, rows].flatten(0, 1))
        if x.needs[0] or x.needs[1]:
            of_h = _matmul_t(grad, x.rows_of_weight(columns).T, grad.dtype)
            for total, part in zip(self._of_h, of_h.chunk(len(self._of_h)), strict=True):
                total[rows] += part

    def _add_to_weight(self, rows: slice, columns: slice, grad: Tensor, h: Tensor) -> None:
        weight, whole = self._x.weight, rows == _ALL
        if self._of_weight is None:
            self._of_weight = torch.zeros_like(weight, dtype=weight.dtype if whole else h.dtype)
        of_slab = self._of_weight[columns]
        if not whole:
            of_slab.addmm_(grad, h)
        elif of_slab.dtype == h.dtype:
            torch.mm(grad, h, out=of_slab)  # which oneDNN does at half the speed
        else:
            of_slab.copy_(grad @ h)

    def result(self) -> Grads:
        """The gradients; None of what was not wanted."""
        x = self._x
        of_h = [self._of_h[v - self._views.start].to(x.z_a.dtype) if x.needs[v] else None for v in range(2)]
        return of_h[0], of_h[1], self._of_weight.to(x.weight.dtype) if x.needs[2] else None


def _last_layer(
    h_a: Tensor, h_b: Tensor, weight: Tensor, spec: Spec, needs: tuple[bool, bool, bool] = (False, False, False)
) -> LastLayer:
    z = Embeddings(h_a, (len(h_a), len(weight)))
    h = activations(h_a, h_b, spec.normalization is not None)
    return LastLayer(z, z, spec.normalization, h=h, weight=weight, chunk=spec.chunk, needs=needs)


def activations(h_a: Tensor, h_b: Tensor, centred: bool) -> Tensor:  # [N, H], [N, H] -> [2, N, H]
    """Both views' activations in the dtype that everything is computed in; centred, whose mean is removed twice."""
    h = torch.stack((h_a, h_b)).to(_compute_dtype(h_a))
    for _ in range(2 if centred else 0):
        h = h - h.mean(1, keepdim=True)
    return h
