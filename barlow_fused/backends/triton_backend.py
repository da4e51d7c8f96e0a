"""The four operations in Triton: this file allocates and launches, ``triton_kernels/`` computes.

Between the launches stands nothing but allocations: no PyTorch operator, no wait for the GPU, so that a call can be
captured in a CUDA graph. No product goes through a library, and no float is added atomically: the same input gives the
same bits.

                 launches                                  saved for the backward pass, beside the inputs
    normalize    1 (N <= 512), else 2                      stats, and A_hat and B_hat, [2, N, D]
    gram         1                                         K, [2, N, N]
    correlate    2                                         C0, [D, D]
    input_grad   1 (gram), 1 a view (direct)

Half-precision inputs are multiplied in their dtype, with float32 sums (small ones in float32); float32 obeys
PyTorch's switch (``accelerator.tf32``). float64 is not supported: tensor cores have no part in it that this could add
to what PyTorch does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ..normalization import Normalization
from ..reference import BarlowTwinsTerms
from .accelerator import guard
from .normalized import Normalized, empty_terms
from .operations import Weights
from .triton_kernels import configs
from .triton_kernels.configs import Blocks, precision_of
from .triton_kernels.correlate import correlate_kernel, correlate_terms_kernel
from .triton_kernels.direct_grad import direct_grad_kernel
from .triton_kernels.gram import gram_kernel
from .triton_kernels.gram_grad import gram_grad_kernel
from .triton_kernels.normalize import apply_moments_kernel, moments_kernel, normalize_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def empty_saved(z_a: Tensor, route: str, normalization: Normalization | None) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of [product, *saved]."""
    n, d = z_a.shape
    dtype = configs.compute_dtype(n, d, z_a.dtype, normalization is not None)
    product = z_a.new_empty((2, n, n) if route == "gram" else (d, d), dtype=dtype)
    stats = _empty_stats(z_a, normalization, dtype)
    return [product, stats] if normalization is None else [product, stats, z_a.new_empty(2, n, d, dtype=dtype)]


def normalize(z_a: Tensor, z_b: Tensor, normalization: Normalization | None) -> Normalized:
    """A_hat and B_hat, and every feature's statistics and c = diag(C) in float32."""
    if z_a.dtype not in DTYPES:
        raise TypeError(f"backend='triton' takes float32, bfloat16 and float16, got {z_a.dtype}: use backend='torch'")
    n, d = z_a.shape
    normalized = normalization is not None
    convention = normalization or Normalization()
    dtype = configs.compute_dtype(n, d, z_a.dtype, normalized)
    hats = z_a.new_empty(2, n, d, dtype=dtype) if normalized else None
    a_hat, b_hat = hats.unbind() if normalized else (None, None)
    stats = _empty_stats(z_a, normalization, dtype)
    slab = next((slab for slab in configs.NORMALIZE if n <= slab.rows), None)
    columns = (slab or configs.TWO_PHASES).columns
    slabs = triton.cdiv(d, columns)
    sums = torch.empty(2, slabs, dtype=torch.float64, device=z_a.device)
    tiles = configs.triangle(n, configs.chip(z_a.device).gram(n, dtype).m)
    counters = torch.empty(tiles + 1, dtype=torch.int32, device=z_a.device)
    shared = {
        "NORMALIZE": normalized,
        "EPS_IN_ROOT": convention.eps_added_to == "variance",
        "BLOCK_D": columns,
        "BLOCK_COUNTERS": triton.next_power_of_2(triton.cdiv(counters.numel(), slabs)),
    }
    z = (z_a, z_b, *z_a.stride(), *z_b.stride())
    results = (stats, sums, counters, counters.numel(), n, d)
    with guard(z_a):
        if slab is not None:
            rows = max(16, triton.next_power_of_2(n))
            arguments = (*z, a_hat, b_hat, *results, convention.eps, convention.correction)
            normalize_kernel[(slabs,)](*arguments, BLOCK_N=rows, **shared, num_warps=slab.num_warps)
        else:
            block = configs.TWO_PHASES
            per_chunk = block.rows * triton.cdiv(n, block.rows * configs.MAX_CHUNKS)
            chunks = triton.cdiv(n, per_chunk)
            partials = torch.empty(chunks, 5, d, dtype=torch.float32, device=z_a.device)
            options = {"BLOCK_N": block.rows, "num_warps": block.num_warps}
            moments_kernel[(slabs, chunks)](
                *z, partials, n, d, per_chunk, NORMALIZE=normalized, BLOCK_D=columns, **options
            )
            arguments = (*z, partials, chunks, a_hat, b_hat, *results, per_chunk, convention.eps, convention.correction)
            apply_moments_kernel[(slabs, chunks if normalized else 1)](*arguments, **shared, **options)
    return Normalized(z_a, z_b, normalization, hats, stats, sums, counters)


def gram(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor | None]:
    """The terms, and K_a / D and K_b / D, less I - 1 1^T / N where features are standardised, (2, N, N)."""
    n, d = x.z_a.shape
    precision, chip = precision_of(x.dtype), configs.chip(x.z_a.device)
    blocks = chip.gram(n, x.dtype)
    tiles = configs.triangle(n, blocks.m)
    split, steps = chip.split(n, d, x.z_a.element_size(), blocks)
    terms = empty_terms(x.z_a)
    a_hat, b_hat = x.views
    k = x.z_a.new_empty(2, n, n, dtype=x.dtype) if need_grad else None
    partials = x.stats.new_empty(split * 2 * tiles * blocks.m**2)
    inner = x.sums.new_empty(tiles)
    tma = x.hats is not None and n % blocks.m == 0 and _use_tma(a_hat)
    both = _descriptor(x.hats.view(2 * n, d), blocks.m, blocks.k) if tma else a_hat
    with guard(x.z_a):
        _tuned(gram_kernel)[(tiles * 2 * split,)](
            *(both, b_hat, *a_hat.stride(), *b_hat.stride(), partials, k, inner, x.sums, x.counters, *terms),
            *(n, d, tiles, split, steps, x.sums.shape[1], lambd, scale),
            SHIFT=0 if x.normalization is None else 1,
            BLOCK=blocks.m,
            BLOCK_K=blocks.k,
            CHUNK=chunk(precision, steps * blocks.k),
            EVEN=n % blocks.m == 0 and d % blocks.k == 0,
            TMA=tma,
            UNIT_STRIDE=_unit_stride(a_hat, b_hat),
            PRECISION=input_precision(precision),
            ROWS=16,
            BLOCK_SUM=configs.SUM_BLOCK,
            **_options(blocks),
        )
    return terms, k


def correlate(
    x: Normalized,
    lambd: float,
    scale: float,
    need_grad: bool,
    dtype: torch.dtype | None = None,  # of C; the dtype that is multiplied
) -> tuple[BarlowTwinsTerms, Tensor | None]:
    """The terms, and C with its diagonal set to 0, (D, D). Fills the rows PRODUCT of ``x.stats``."""
    n, d = x.z_a.shape
    precision = precision_of(x.dtype)
    blocks = configs.chip(x.z_a.device).correlate(d, x.dtype)
    tiles = triton.cdiv(d, blocks.m)
    terms = empty_terms(x.z_a)
    c = x.z_a.new_empty(d, d, dtype=dtype or x.dtype) if need_grad else None
    row_sums = x.stats.new_empty(2, tiles, d) if need_grad and x.normalization is not None else None
    off_sums = x.sums.new_empty(tiles**2)
    factors = (x.z_a, x.z_b, *x.views) if x.raw else x.views * 2
    tma = _use_tma(*factors)
    operands = [_descriptor(t, blocks.k, blocks.m) if tma else t for t in factors]
    strides = [(*a.stride(), *b.stride()) for a, b in (factors[:2], factors[2:])]
    with guard(x.z_a):
        _tuned(correlate_kernel)[(tiles**2,)](
            *(
                *operands[:2],
                *strides[0],
                *operands[2:],
                *strides[1],
                x.stats,
                c,
                row_sums,
                off_sums,
                n,
                d,
                configs.raw_limit(n),
            ),
            RAW=x.raw,
            BLOCK=blocks.m,
            BLOCK_K=blocks.k,
            GROUP=8,
            EVEN=d % blocks.m == 0 and n % blocks.k == 0,
            TMA=tma,
            PRECISION=input_precision(precision),
            **_options(blocks),
        )
        columns = 128
        correlate_terms_kernel[(triton.cdiv(d, columns) if row_sums is not None else 1,)](
            *(row_sums, off_sums, x.stats, x.sums, *terms, d, tiles, x.sums.shape[1], lambd, scale),
            BLOCK_D=columns,
            BLOCK_SUM=configs.SUM_BLOCK,
            num_warps=8,
        )
    return terms, c


def input_grad(
    x: Normalized,
    product: Tensor,  # what gram or correlate returned
    route: str,
    weights: Weights,
    needs: tuple[bool, bool],  # which of the two gradients are wanted
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dz_a and dL/dz_b, in the inputs' dtype."""
    grads = tuple(torch.empty_like(z) if need else None for z, need in zip((x.z_a, x.z_b), needs, strict=True))
    if any(needs):
        write_grads(x, product, route, weights, grads, x.z_a.shape[1])
    return grads


def write_grads(
    x: Normalized,
    product: Tensor,
    route: str,
    weights: Weights,
    grads: tuple[Tensor | None, Tensor | None],
    k_divisor: int,  # what K was divided by: D, of all features where x has a part of them
) -> None:
    """``input_grad`` into tensors of the caller's."""
    with guard(x.z_a):
        if route == "gram":
            _gram_grad(x, product, weights, grads, k_divisor)
        else:
            _direct_grad(x, product, weights, grads)


def _gram_grad(
    x: Normalized,
    k: Tensor,
    weights: Weights,
    grads: tuple[Tensor | None, Tensor | None],
    k_divisor: int,
) -> None:
    n, d = x.z_a.shape
    precision = precision_of(x.dtype)
    normalized = x.normalization is not None
    blocks = configs.chip(x.z_a.device).gram_grad(n, d, x.dtype, normalized)
    slabs = triton.cdiv(d, blocks.n)
    views = [view for view in range(2) if grads[view] is not None]
    out = [grads[view] if grads[view] is not None else grads[views[0]] for view in range(2)]
    a_hat, b_hat = x.views
    tma = normalized and n % blocks.m == n % blocks.k == 0 and _use_tma(a_hat, k[0])
    right = _descriptor(x.hats.view(2 * n, d), blocks.k, blocks.n) if tma else a_hat
    left = _descriptor(k.view(2 * n, n), blocks.m, blocks.k) if tma else k
    views_z = (x.z_a, x.z_b) if x.raw else x.views
    row_tiles = 1 if normalized else triton.cdiv(n, blocks.m)
    _tuned(gram_grad_kernel)[(len(views) * slabs * row_tiles,)](
        *(*views_z, *views_z[0].stride(), *views_z[1].stride()),
        *(right, b_hat, *a_hat.stride(), *b_hat.stride(), left, x.stats),
        *(*out, *out[0].stride(), *out[1].stride(), *weights[:3], n, d, k_divisor),
        *(views[0], slabs, weights.lambd, weights.scale),
        NORMALIZED=normalized,
        RAW=x.raw,
        SHIFT=1 if normalized else 0,
        WALK=normalized and n > blocks.m,
        BLOCK_M=blocks.m,
        BLOCK_D=blocks.n,
        BLOCK_K=blocks.k,
        CHUNK=chunk(precision, n),
        EVEN=n % blocks.m == 0 and n % blocks.k == 0 and d % blocks.n == 0,
        TMA=tma,
        PRECISION=input_precision(precision),
        UNIT_STRIDE=_unit_stride(*views_z),
        UNIT_STRIDE_RIGHT=_unit_stride(a_hat, b_hat),
        UNIT_STRIDE_GRAD=_unit_stride(*out),
        **_options(blocks),
    )


def _direct_grad(x: Normalized, c: Tensor, weights: Weights, grads: tuple[Tensor | None, Tensor | None]) -> None:
    n, d = x.z_a.shape
    precision = precision_of(x.dtype)
    blocks = configs.chip(x.z_a.device).direct_grad(n, d, x.dtype)
    hats = x.views
    views_z = (x.z_a, x.z_b) if x.raw else hats
    for view, grad in enumerate(grads):
        if grad is None:
            continue
        own, other, left, right = views_z[view], views_z[1 - view], hats[1 - view], c
        strides = (*own.stride(), *other.stride())
        left_strides = left.stride()
        tma = _use_tma(left, right)
        if tma:
            left = _descriptor(left, blocks.m, blocks.k)
            right = _descriptor(c, *((blocks.k, blocks.n) if view else (blocks.n, blocks.k)))
        _tuned(direct_grad_kernel)[(triton.cdiv(n, blocks.m) * triton.cdiv(d, blocks.n),)](
            *(own, other, *strides, left, *left_strides, right, x.stats, grad, *grad.stride()),
            *(*weights[:3], n, d, weights.lambd, weights.scale),
            VIEW=view,
            NORMALIZED=x.normalization is not None,
            RAW=x.raw,
            BLOCK_M=blocks.m,
            BLOCK_D=blocks.n,
            BLOCK_K=blocks.k,
            GROUP=8,
            EVEN=n % blocks.m == 0 and d % blocks.n == 0 and d % blocks.k == 0,
            TMA=tma,
            PRECISION=input_precision(precision),
            **_options(blocks),
        )


def _empty_stats(z: Tensor, normalization: Normalization | None, dtype: torch.dtype) -> Tensor:
    rows = configs.stats_rows(normalization is not None, raw=dtype != torch.float32)
    return torch.empty(rows, z.shape[1], dtype=torch.float32, device=z.device)


def chunk(precision: str, length: int) -> int:
    """blocks.matmul's CHUNK for sums of ``length`` products."""
    return 0 if precision == "tf32x3" or length <= configs.CHUNK else configs.CHUNK


def input_precision(precision: str) -> str:
    """blocks.matmul's PRECISION."""
    return "tf32x3" if precision == "tf32x3" else "tf32"


def _unit_stride(*tensors: Tensor) -> bool:
    """Whether features are contiguous in all of them."""
    return all(t.stride(1) == 1 for t in tensors)


def _use_tma(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can load blocks of these matrices, and is worth its descriptors."""
    if not configs.has_tma(tensors[0].device) or tensors[0].numel() < configs.TMA_MIN_ELEMENTS:
        return False
    return all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns])


def _options(blocks: Blocks) -> dict[str, int]:
    return {} if configs.autotuned() else blocks.options()


def _tuned(kernel: Any) -> Any:
    """The kernel, or where it is asked for one that measures num_warps and num_stages for each shape first."""
    return _autotuner(kernel) if configs.autotuned() else kernel


@functools.cache
def _autotuner(kernel: Any) -> Any:
    choices = [triton.Config({}, num_warps=w, num_stages=s) for w in (4, 8) for s in (2, 3, 4)]
    key = ["N", "D", *(name for name in kernel.arg_names if name.isupper() and name not in ("N", "D"))]
    return triton.autotune(choices, key)(kernel)
