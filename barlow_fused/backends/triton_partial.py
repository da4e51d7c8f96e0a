"""The Triton backend's operations on one rank's part of a batch (torch_partial.py says what these are).

Where the time goes, in the products, Triton's kernels compute; with global statistics the Gram route's backward pass
is the one fused kernel of the local loss. What is elementwise (statistics, standardising, and elsewhere the
normalisation's backward pass) is PyTorch's: a rank has a P-th of it.

    partial_gram        partial_gram_kernel
    partial_correlate   correlate_kernel, of standardised features: raw ones can be centred only by their own means
    input_grad          gram_grad_kernel; direct_grad_kernel, or with several segments gram_grad_kernel, without
                        normalisation, whose backward pass needs means over segments, or over samples elsewhere
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Weights, triton_backend
from .torch_backend import PANEL
from .torch_partial import KeptView as View
from .torch_partial import (
    Result,
    Segments,
    diagonal,
    join_gram,
    moments,
    panel_sizes,
    through_normalization,
    without_bulk,
)
from .triton_backend import Normalized
from .triton_kernels import blocks, configs
from .triton_kernels.configs import precision_of
from .triton_kernels.partial_gram import partial_gram_kernel

__all__ = ["Segments", "View", "diagonal", "input_grad", "join_gram", "moments", "partial_correlate", "partial_gram"]

_ALL = slice(None)


def partial_gram(view: View, total_d: int) -> tuple[Tensor, Tensor]:
    """K less its bulk, as torch_partial's."""
    n, d = view.z.shape
    precision, chip = precision_of(view.hat.dtype), configs.chip(view.z.device)
    tile = chip.gram(n, view.hat.dtype)
    split, steps = chip.split(n, d, view.z.element_size(), tile)
    size = sum(panel_sizes(n))
    partials = torch.empty(split, size, dtype=torch.float32, device=view.z.device)
    tiles = configs.cdiv(n, tile.m)
    with triton_backend._device(view.z):
        partial_gram_kernel[(tiles, tiles, split)](
            *(view.hat, partials, n, d, size, steps),
            PANEL=PANEL,
            BLOCK=tile.m,
            BLOCK_K=tile.k,
            CHUNK=triton_backend._chunk(precision, steps * tile.k),
            EVEN=n % tile.m == 0 and d % tile.k == 0,
            PRECISION=triton_backend._input_precision(precision),
            **tile.options(),
        )
    flat = partials.sum(0) if split > 1 else partials[0]
    return without_bulk(flat, view)


def partial_correlate(a: View, b: View) -> Tensor:  # [D, D]
    """A_hat^T B_hat over the samples that are here, but for its diagonal, which is 0."""
    n, d = a.z.shape
    x = _plain(a.hat, b.hat, a.hat.new_zeros(d, dtype=torch.float32))
    return triton_backend.correlate(x, 0.0, 1.0, need_grad=True, dtype=torch.float32)[1].mul_(n)


def input_grad(views: list[View], view: int, result: Result) -> Tensor:  # [N, D]
    """dL/dz of one view."""
    own = views[view]
    segments, convention = own.segments.sizes, own.normalization
    if result.route == "gram" and convention is not None and len(segments) == 1:
        grad = torch.empty_like(own.z)
        _launch(_normalized(views, result.c), view, result, grad)
        return grad
    grad = torch.empty_like(own.z, dtype=torch.float32)
    _launch(_plain(views[0].hat, views[1].hat, result.c), view, result, grad)
    return through_normalization(own, view, own.slab(_ALL), grad, result, _ALL).to(own.z.dtype)


def _launch(x: Normalized, view: int, result: Result, grad: Tensor) -> None:
    """Write one view's gradient."""
    n = x.z_a.shape[0]
    share = n / result.n  # the kernels divide by the samples that are here
    weights = Weights(None, (result.w_on * share).float(), (result.w_off * share).float(), 0.0, 1.0)
    grads = (None, grad) if view else (grad, None)
    product = result.product.to(x.dtype)
    with triton_backend._device(x.z_a):
        if result.route == "gram":
            triton_backend._gram_grad(x, product, weights, grads, k_divisor=result.d)
        else:
            triton_backend._direct_grad(x, product, weights, grads)


def _plain(a_hat: Tensor, b_hat: Tensor, c: Tensor) -> Normalized:
    """Standardised features, of which nothing more is known than c."""
    sums = torch.zeros(2, 1, dtype=torch.float64, device=c.device)
    return Normalized(a_hat, b_hat, None, None, c[None].contiguous(), sums)


def _normalized(views: list[View], c: Tensor) -> Normalized:
    """Both views in one segment, with all rows of ``stats`` that gram_grad reads."""
    a, b = views
    stats = torch.empty(configs.stats_rows(normalized=True, raw=True), len(c), dtype=torch.float32, device=c.device)
    stats[blocks.C.value] = c
    for index, view in enumerate(views):
        stats[blocks.RSTD.value + index] = view.rstd[0]
        stats[blocks.KAPPA.value + index] = view.kappa[0]
        stats[blocks.SQUARE.value + index] = (view.var * view.rstd.square())[0]
        stats[blocks.MEAN.value + index] = (view.mean - view.shift / view.rstd)[0]
    return Normalized(a.z, b.z, a.normalization, torch.stack((a.hat, b.hat)), stats)
