"""How the CUDA backend launches on one rank's part of a batch; what is made of it is kernel_partial.py's."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda_backend
from .cuda_backend import DTYPES, STATS_ROWS, Normalized
from .kernel_partial import Kernels, StatsRows
from .torch_partial import KeptView as View
from .torch_partial import diagonal, join_gram, moments, panel_sizes
from .torch_slabs import PANEL

__all__ = ["View", "diagonal", "input_grad", "join_gram", "moments", "partial_correlate", "partial_gram"]


def _gram_panels(hat: Tensor) -> Tensor:
    n, d = hat.shape
    x = cuda_backend.with_aligned_rows(hat)
    kernels = cuda_backend.extension()
    plan = kernels.plan_partial_gram(n, d, DTYPES[x.dtype], x.device.index or 0)
    size = sum(panel_sizes(n))
    partials = torch.empty(plan.split, size, dtype=torch.float32, device=x.device)
    cuda_backend.Now(x).launch(
        "partial_gram",
        x=cuda_backend.matrix(x),
        partials=partials.data_ptr(),
        size=size,
        n=n,
        d=d,
        panel=PANEL,
        block=plan.block,
        split=plan.split,
        steps=plan.steps,
        tf32=cuda_backend.tf32(x.dtype),
    )
    return partials


def _plain(a_hat: Tensor, b_hat: Tensor, c: Tensor) -> Normalized:
    a_hat, b_hat = cuda_backend.with_aligned_rows(a_hat), cuda_backend.with_aligned_rows(b_hat)
    sums = torch.zeros(2, 1, dtype=torch.float64, device=c.device)
    counters = torch.zeros(cuda_backend.counter_count(a_hat), dtype=torch.int32, device=c.device)
    return Normalized(a_hat, b_hat, None, None, c[None].contiguous(), sums, counters)


_kernels = Kernels(
    _gram_panels,
    cuda_backend.OPERATIONS,
    cuda_backend.Now,
    _plain,
    cuda_backend.with_aligned_rows,
    StatsRows(count=STATS_ROWS, c=0, mean=1, rstd=3, kappa=5, square=7),  # kernels.h
)
partial_gram, partial_correlate, input_grad = _kernels.partial_gram, _kernels.partial_correlate, _kernels.input_grad
