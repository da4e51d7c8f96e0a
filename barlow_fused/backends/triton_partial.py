"""How the Triton backend launches on one rank's part of a batch; what is made of it is kernel_partial.py's."""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_backend, triton_launch
from .accelerator import guard
from .kernel_partial import Kernels, StatsRows
from .normalized import Normalized
from .torch_partial import KeptView as View
from .torch_partial import diagonal, join_gram, moments, panel_sizes
from .torch_slabs import PANEL
from .triton_kernels import blocks, configs
from .triton_kernels.partial_gram import partial_gram_kernel

__all__ = ["View", "diagonal", "input_grad", "join_gram", "moments", "partial_correlate", "partial_gram"]


def _padded(x: Tensor) -> Tensor:
    """x, or a copy with zeros up to the end of each row, as the kernels read them."""
    columns = x.shape[-1]
    rest = -columns % (configs.ROW_BYTES // x.element_size())
    return torch.nn.functional.pad(x, (0, rest))[..., :columns] if rest else x


def _gram_panels(hat: Tensor) -> Tensor:
    n, d = hat.shape
    hat = _padded(hat)
    chip = configs.chip(hat.device)
    precision, tile = chip.precision(hat.dtype), chip.gram(n, hat.dtype)
    split, steps = chip.split(n, d, hat.element_size(), tile)
    size = sum(panel_sizes(n))
    cut = triton_backend.chunk(precision, steps * tile.k)
    partials = torch.empty(split, size, dtype=torch.float32, device=hat.device)
    tiles = configs.cdiv(n, tile.m)
    with guard(hat):
        partial_gram_kernel[(tiles, tiles, split)](
            *(hat, triton_backend.pitch(hat), partials, n, d, size, steps),
            PANEL=PANEL,
            BLOCK=tile.m,
            BLOCK_K=tile.k,
            CHUNK=cut,
            PRECISION=triton_backend.input_precision(precision),
            **(tile.without_limit() if cut else tile).options(),
        )
    return partials


def _plain(a_hat: Tensor, b_hat: Tensor, c: Tensor) -> Normalized:
    sums = torch.zeros(2, 1, dtype=torch.float64, device=c.device)
    return Normalized(a_hat, b_hat, None, None, c[None].contiguous(), sums)


_kernels = Kernels(
    _gram_panels,
    triton_backend.OPERATIONS,
    triton_launch.Now,
    _plain,
    _padded,
    StatsRows(
        count=configs.stats_rows(normalized=True, raw=True),
        c=blocks.C.value,
        mean=blocks.MEAN.value,
        rstd=blocks.RSTD.value,
        kappa=blocks.KAPPA.value,
        square=blocks.SQUARE.value,
    ),
)
partial_gram, partial_correlate, input_grad = _kernels.partial_gram, _kernels.partial_correlate, _kernels.input_grad
