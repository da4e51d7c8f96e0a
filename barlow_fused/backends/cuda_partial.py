"""The CUDA backend's operations on one rank's part of a batch (torch_partial.py says what these are).

As in triton_partial.py the products, where the time goes, are the kernels'; what is elementwise is PyTorch's:

    partial_gram        partial_gram
    partial_correlate   correlate, of standardised features: raw ones can be centred only by their own means
    input_grad          gram_grad; direct_grad, or with several segments gram_grad, without normalisation, whose
                        backward pass needs means over segments, or over samples elsewhere
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Weights, cuda_backend
from .cuda_backend import DTYPES, Normalized
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

__all__ = ["Segments", "View", "diagonal", "input_grad", "join_gram", "moments", "partial_correlate", "partial_gram"]


def partial_gram(view: View, total_d: int) -> tuple[Tensor, Tensor]:
    """K less its bulk, as torch_partial's."""
    n, d = view.z.shape
    x = cuda_backend.aligned(view.hat)
    kernels = cuda_backend.extension()
    plan = kernels.plan_partial_gram(n, d, DTYPES[x.dtype], x.device.index or 0)
    size = sum(panel_sizes(n))
    partials = torch.empty(plan.split, size, dtype=torch.float32, device=x.device)
    kernels.partial_gram(
        x=cuda_backend.matrix(x),
        partials=partials.data_ptr(),
        size=size,
        n=n,
        d=d,
        panel=PANEL,
        block=plan.block,
        split=plan.split,
        steps=plan.steps,
        tf32=cuda_backend.tf32(),
        **cuda_backend.stream(x),
    )
    return without_bulk(partials.sum(0) if plan.split > 1 else partials[0], view)


def partial_correlate(a: View, b: View) -> Tensor:  # [D, D]
    """A_hat^T B_hat over the samples that are here, but for its diagonal, which is 0."""
    n, d = a.z.shape
    x = _plain(a.hat, b.hat, a.hat.new_zeros(d, dtype=torch.float32))
    return cuda_backend.correlate(x, 0.0, 1.0, need_grad=True, dtype=torch.float32)[1].contiguous().mul_(n)


def input_grad(views: list[View], view: int, result: Result) -> Tensor:  # [N, D]
    """dL/dz of one view."""
    own = views[view]
    if result.route == "gram" and own.normalization is not None and len(own.segments.sizes) == 1:
        grad = torch.empty_like(own.z)
        _launch(_normalized(views, result.c), view, result, grad)
        return grad
    grad = torch.empty_like(own.z, dtype=torch.float32)
    _launch(_plain(views[0].hat, views[1].hat, result.c), view, result, grad)
    everything = slice(None)
    return through_normalization(own, view, own.slab(everything), grad, result, everything).to(own.z.dtype)


def _launch(x: Normalized, view: int, result: Result, grad: Tensor) -> None:
    """Write one view's gradient."""
    share = x.z_a.shape[0] / result.n  # the kernels divide by the samples that are here
    weights = Weights(None, (result.w_on * share).float(), (result.w_off * share).float(), 0.0, 1.0)
    grads = (None, grad) if view else (grad, None)
    product = cuda_backend.aligned(result.product.to(x.dtype))
    cuda_backend.write_grads(x, product, result.route, weights, grads, k_divisor=result.d)


def _plain(a_hat: Tensor, b_hat: Tensor, c: Tensor) -> Normalized:
    """Standardised features, of which nothing more is known than c."""
    a_hat, b_hat = cuda_backend.aligned(a_hat), cuda_backend.aligned(b_hat)
    sums = torch.zeros(2, 1, dtype=torch.float64, device=c.device)
    counters = torch.zeros(cuda_backend.counter_count(a_hat), dtype=torch.int32, device=c.device)
    return Normalized(a_hat, b_hat, None, None, c[None].contiguous(), sums, counters)


def _normalized(views: list[View], c: Tensor) -> Normalized:
    """Both views in one segment, with all rows of ``stats`` that gram_grad reads (kernels.h)."""
    a, b = views
    stats = torch.empty(cuda_backend.STATS_ROWS, len(c), dtype=torch.float32, device=c.device)
    stats[0] = c
    for index, view in enumerate(views):
        stats[1 + index] = (view.mean - view.shift / view.rstd)[0]
        stats[3 + index] = view.rstd[0]
        stats[5 + index] = view.kappa[0]
        stats[7 + index] = (view.var * view.rstd.square())[0]
    hats = cuda_backend.aligned(torch.stack((a.hat, b.hat)))
    return Normalized(a.z, b.z, a.normalization, hats, stats)
