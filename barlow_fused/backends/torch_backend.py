"""The four operations in PyTorch: the product on CPUs, and what runs wherever PyTorch runs.

Two ideas make it fast:

* **Slabs.** Standardised features are never stored. Each operation walks over slabs of the inputs that fit the caches,
  standardises a slab, multiplies it and drops it, so the inputs are the only (N, D) arrays that travel from memory, and
  the extra memory is the product plus a few slabs.
* **oneDNN's matrix product.** ``torch.mm`` in float32 goes to MKL, which uses AVX2 on AMD processors; oneDNN generates
  AVX-512 code there and is twice as fast, at the same float32 accuracy (benchmarks/NOTES.md).

Means are removed twice: the first mean is rounded to the inputs' precision, which leaves an error of |mean| * 6e-8 in
float32; the mean of what is left (``residual``) removes that, so that features with |mean|/std = 1000 lose nothing.

Both routes end in the same gradient. With S = B_hat^T A_hat / N (the transposed C), the product P = B_hat S carries all
of the matrix work: P = K_b A_hat / N in the Gram route, P = B_hat C0^T in the direct one, where C0 is C with its
diagonal set to 0. What remains is elementwise (``input_grad``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ..normalization import Normalization

SLAB_ELEMENTS = 2**18  # a float32 slab of 1 MiB: a core's L2 cache
MIN_SLAB = 1024  # rows or columns: enough for the matrix product to run at full rate
PANEL = 256  # rows of the lower-triangle panels of a symmetric product
ONEDNN_MIN_FLOPS = 8e6  # below this, oneDNN's 20 us of set-up cost more than it saves

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


@dataclasses.dataclass(frozen=True)
class Normalized:
    """Two views, and what it takes to standardise them: x_hat = ((z - mean) - residual) * rstd."""

    z_a: Tensor  # [N, D]
    z_b: Tensor  # [N, D]
    stats: Tensor | None  # [2, 4, D] of each view: mean, residual, rstd, kappa; None: the inputs are used as they are
    c: Tensor  # [D] diag(C), in the dtype that everything is computed in

    def slab(self, view: int, rows: slice, columns: slice) -> Tensor:
        """A contiguous slab of A_hat (``view`` 0) or B_hat (1)."""
        z = (self.z_a, self.z_b)[view][rows, columns].to(self.c.dtype)
        if self.stats is None:
            return z.contiguous()
        mean, residual, rstd, _ = self.stats[view, :, columns].unbind()
        centred = z - mean
        return torch.addcmul(-residual * rstd, centred, rstd, out=centred)


def normalize(z_a: Tensor, z_b: Tensor, normalization: Normalization | None) -> Normalized:
    """Statistics of every feature of both views, and c = diag(C), in one pass over the inputs.

    ``normalization=None`` takes the inputs as they are and computes only c.
    """
    n, d = z_a.shape
    dtype = torch.promote_types(z_a.dtype, torch.float32)
    c = torch.empty(d, dtype=dtype, device=z_a.device)
    if normalization is None:
        for s in _slabs(d, n):
            c[s] = (z_a[:, s].to(dtype) * z_b[:, s]).mean(0)
        return Normalized(z_a, z_b, None, c)
    stats = torch.empty(2, 4, d, dtype=dtype, device=z_a.device)
    for s in _slabs(d, n):
        slab_stats = stats[:, :, s]
        centred = []
        for z, stat in zip((z_a, z_b), slab_stats, strict=True):
            z = z[:, s].to(dtype)
            mean = torch.mean(z, 0, out=stat[0])
            x = z - mean
            centred.append(x)
            residual = torch.mean(x, 0, out=stat[1])
            var = (x * x).mean(0).addcmul_(residual, residual, value=-1).clamp_min_(0)
            stat[2] = normalization.rstd(var, n)
            stat[3] = normalization.kappa(var, n)
        (_, residual_a, rstd_a, _), (_, residual_b, rstd_b, _) = slab_stats
        covariance = centred[0].mul_(centred[1]).mean(0).addcmul_(residual_a, residual_b, value=-1)
        torch.mul(covariance, rstd_a * rstd_b, out=c[s])
    return Normalized(z_a, z_b, stats, c)


def gram(x: Normalized) -> tuple[Tensor, Tensor]:
    """K_a / D and K_b / D stacked, (2, N, N), and the off-diagonal sum of C squared: 4 N^2 D FLOPs at most."""
    n, d = x.z_a.shape
    k = x.c.new_zeros(2, n, n)
    for s in _slabs(d, n):
        for view in range(2):
            x_hat = x.slab(view, slice(None), s)
            for start in range(0, n, PANEL):  # rows of the lower triangle
                stop = min(start + PANEL, n)
                k[view, start:stop, :stop] += _matmul_t(x_hat[start:stop], x_hat[:stop], x.z_a.dtype)
    k /= d
    for start in range(PANEL, n, PANEL):  # mirror it
        stop = min(start + PANEL, n)
        k[:, :start, start:stop] = k[:, start:stop, :start].mT
    inner = (k[0] * k[1]).sum(dtype=torch.float64) * (d / n) ** 2
    return k, (inner - x.c.double().square().sum()).clamp_min_(0)


def correlate(x: Normalized) -> tuple[Tensor, Tensor]:
    """C with its diagonal set to 0, (D, D), and the sum of its squares: 2 N D^2 FLOPs."""
    n, d = x.z_a.shape
    c = x.c.new_zeros(d, d)
    for s in _slabs(n, d):
        c += _matmul_t(x.slab(0, s, slice(None)).T, x.slab(1, s, slice(None)).T, x.z_a.dtype)
    c /= n
    c.fill_diagonal_(0)
    return c, torch.linalg.vecdot(c, c).sum(dtype=torch.float64)


def input_grad(
    x: Normalized,
    product: Tensor,  # what gram or correlate returned
    route: str,
    w_on: Tensor,  # [] the gradient with respect to on_diag
    w_off: Tensor,  # [] the gradient with respect to off_diag
    needs: tuple[bool, bool],  # which of the two gradients are wanted
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dz_a and dL/dz_b. For view a (b: exchange a and b), with everything per feature in one number:

    grad_a = rstd_a * (alpha * P + d * B_hat - kappa_a * m * A_hat),   m = mean_n(A_hat * (alpha * P + d * B_hat))
    """
    n, features = x.z_a.shape
    w_on, w_off = w_on.to(x.c.dtype), w_off.to(x.c.dtype)
    alpha = 2 * w_off / n
    d = (x.c - 1) * (2 * w_on / n)
    if route == "gram":  # P contains C's diagonal
        d = d - x.c * alpha
        alpha = alpha * (features / n)
        blocks = [(slice(None), s) for s in _slabs(features, n)]
    else:
        r = (torch.linalg.vecdot(product, product), torch.linalg.vecdot(product, product, dim=0))  # mean_n(A_hat * P)
        blocks = [(s, slice(None)) for s in _slabs(n, features)]
    grads = [torch.empty_like(z) if need else None for z, need in zip((x.z_a, x.z_b), needs, strict=True)]
    for rows, columns in blocks:
        hats = x.slab(0, rows, columns), x.slab(1, rows, columns)
        for view in range(2):
            if grads[view] is None:
                continue
            own, other = hats[view], hats[1 - view]
            if route == "gram":
                p = _matmul_t(product[1 - view], own.T, x.z_a.dtype)
            else:
                p = _matmul_t(other, product if view == 0 else product.T, x.z_a.dtype)
            grad = grads[view][rows, columns]
            if x.stats is None:
                grad.copy_(p.mul_(alpha).addcmul_(other, d[columns]))
                continue
            rstd, kappa = x.stats[view, 2:, columns].unbind()
            mean_p = (own * p).mean(0) if route == "gram" else r[view]
            m = mean_p * alpha + x.c[columns] * d[columns]
            p.mul_(rstd * alpha).addcmul_(other, d[columns] * rstd).addcmul_(own, m * kappa * rstd, value=-1)
            grad.copy_(p)
    return grads[0], grads[1]


def _slabs(length: int, other: int) -> Iterator[slice]:
    """Cut ``length`` columns (or rows) of ``other`` elements each into slabs."""
    step = max(MIN_SLAB, SLAB_ELEMENTS // other)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _matmul_t(x: Tensor, y: Tensor, input_dtype: torch.dtype) -> Tensor:  # [M, K], [L, K] -> [M, L]
    """x @ y.T by the library that multiplies fastest: on CUDA in the inputs' dtype with float32 sums."""
    if x.device.type == "cpu":
        large = 2 * x.shape[0] * x.shape[1] * y.shape[0] > ONEDNN_MIN_FLOPS
        if large and x.dtype == torch.float32 and _ONEDNN is not None:
            return _ONEDNN(x, y, None, "none", [], "")
    elif input_dtype in (torch.float16, torch.bfloat16):
        return torch.mm(x.to(input_dtype), y.to(input_dtype).T, out_dtype=torch.float32)
    return x @ y.T
