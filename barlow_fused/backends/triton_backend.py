"""The four operations in Triton: this file says what is launched, ``triton_kernels/`` computes.

Between the launches stands nothing but allocations: no PyTorch operator, no wait for the GPU, so that a call can be
captured in a CUDA graph. No product goes through a library, and no float is added atomically: the same input gives the
same bits. passes.py plans a pass by running the operations on arrays without memory, triton_launch.py launches.

                 launches                                  saved for the backward pass, beside the inputs
    normalize    1 (N <= 512), else 2                      stats, and A_hat and B_hat, [2, N, D]
    gram         1                                         K, [2, N, N]
    correlate    2                                         C0, [D, D]
    input_grad   gram: 1 (N <= 256), else 2; direct: 1 a view

Half-precision inputs are multiplied in their dtype, with float32 sums (small ones in float32); float32 obeys
PyTorch's switch (``accelerator.tf32``). float64 is not supported: tensor cores have no part in it that this could add
to what PyTorch does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton

from ..normalization import Normalization
from . import accelerator
from .arrays import aligned
from .normalized import Matrix, Normalized
from .passes import Operations, Passes
from .triton_kernels import configs
from .triton_kernels.configs import Blocks, cdiv
from .triton_kernels.correlate import correlate_kernel, correlate_terms_kernel
from .triton_kernels.direct_grad import direct_grad_kernel
from .triton_kernels.grad_product import grad_apply_kernel, grad_product_kernel
from .triton_kernels.gram import gram_kernel
from .triton_kernels.gram_grad import gram_grad_kernel
from .triton_kernels.normalize import apply_moments_kernel, moments_kernel, normalize_kernel
from .triton_kernels.shares import shares
from .triton_launch import Block, Now, Recorder


def normalize(
    on: Recorder | Now,
    z_a: Matrix,  # [N, D]
    z_b: Matrix,  # [N, D]
    normalization: Normalization | None,
    stats: Matrix,  # [rows, D] out
    hats: Matrix | None,  # [2, N, D] out
) -> Normalized:
    """A_hat and B_hat, and every feature's statistics and c = diag(C) in float32."""
    n, d = z_a.shape
    normalized = normalization is not None
    convention = normalization or Normalization()
    a_hat, b_hat = hats.unbind() if normalized else (None, None)
    slab = next((slab for slab in configs.NORMALIZE if n <= slab.rows), None)
    columns = (slab or configs.TWO_PHASES).columns
    row = pitch(hats) if normalized else d
    slabs = cdiv(row, columns)
    dtype = hats.dtype if normalized else z_a.dtype
    count = configs.triangle(n, configs.chip(on.device).gram(n, dtype).m) + 1
    sums = on.empty(torch.float64, 2, slabs)
    counters = on.empty(torch.int32, count)
    shared = {
        "NORMALIZE": normalized,
        "EPS_IN_ROOT": convention.eps_added_to == "variance",
        "BLOCK_D": columns,
        "BLOCK_COUNTERS": 32,
    }
    z = (z_a, z_b, *z_a.stride(), *z_b.stride())
    results = (stats, sums, counters, count, n, d)
    if slab is not None:
        rows = max(16, triton.next_power_of_2(n))
        arguments = (*z, a_hat, b_hat, row, *results, convention.eps, convention.correction)
        on.launch(normalize_kernel, (slabs,), *arguments, BLOCK_N=rows, **shared, num_warps=slab.num_warps)
    else:
        block = configs.TWO_PHASES
        per_chunk = block.rows * cdiv(n, block.rows * configs.MAX_CHUNKS)
        chunks = cdiv(n, per_chunk)
        partials = on.empty(torch.float32, chunks, 5, d)
        options = {"BLOCK_N": block.rows, "num_warps": block.num_warps}
        arguments = (*z, partials, n, d, per_chunk)
        on.launch(moments_kernel, (slabs, chunks), *arguments, NORMALIZE=normalized, BLOCK_D=columns, **options)
        arguments = (*z, partials, chunks, a_hat, b_hat, row, *results, per_chunk)
        arguments += (convention.eps, convention.correction)
        on.launch(apply_moments_kernel, (slabs, chunks if normalized else 1), *arguments, **shared, **options)
        on.free(partials)
    return Normalized(z_a, z_b, normalization, hats, stats, sums, counters)


def gram(
    on: Recorder | Now,
    x: Normalized,
    terms: Sequence[Matrix],  # [] out: loss, on_diag, off_diag
    k: Matrix | None,  # [2, N, N] out: K_a / D and K_b / D, less I - 1 1^T / N where features are standardised
) -> None:
    """The terms, and K for a gradient."""
    n, d = x.z_a.shape
    chip = configs.chip(on.device)
    precision, padded = chip.precision(x.dtype), x.hats is not None
    blocks = chip.gram(n, x.dtype) if padded else chip.gram(n, x.dtype).without_limit()
    tiles = configs.triangle(n, blocks.m)
    first, rest = shares(chip, n, d, x.z_a.element_size(), blocks)
    items, steps = first.items + rest.items, max(part.steps for part in (first, rest) if part.tiles)
    a_hat, b_hat = x.views
    partials = on.empty(torch.float32, items * blocks.m**2)
    inner = on.empty(torch.float64, tiles)
    tma = padded and _use_tma(on.device, a_hat)
    both = Block(x.hats.flatten(0, 1), blocks.m, blocks.k) if tma else a_hat
    on.launch(
        *(_tuned(gram_kernel, blocks), (items,)),
        *(both, b_hat, *a_hat.stride(), *b_hat.stride(), partials, k, pitch(k), inner, x.sums, x.counters, *terms),
        *(n, d, tiles, *first, rest.split, rest.steps, x.sums.shape[1], on.lambd, on.scale),
        SHIFT=0 if x.normalization is None else 1,
        BLOCK=blocks.m,
        BLOCK_K=blocks.k,
        CHUNK=chunk(precision, steps * blocks.k),
        WHOLE_K=padded or d % blocks.k == 0,
        TMA=tma,
        UNIT_STRIDE=_unit_stride(a_hat, b_hat),
        PRECISION=input_precision(precision),
        TICKET=accelerator.of(on.device).ticket,
        ROWS=16,
        SLICES=max(1, configs.SLICE_COLUMNS // blocks.m),
        ONE_TILE=n <= blocks.m,
        BLOCK_SUM=configs.SUM_BLOCK,
        **_options(blocks),
    )


def correlate(
    on: Recorder | Now,
    x: Normalized,
    terms: Sequence[Matrix],  # [] out: loss, on_diag, off_diag
    c: Matrix | None,  # [D, D] out: C with its diagonal set to 0
) -> None:
    """The terms, and C for a gradient. Fills the rows PRODUCT of ``x.stats``."""
    n, d = x.z_a.shape
    chip = configs.chip(on.device)
    precision, blocks = chip.precision(x.dtype), chip.correlate(d, x.dtype)
    tiles = cdiv(d, blocks.m)
    row_sums = on.empty(torch.float32, 2, tiles, d) if c is not None and x.normalization is not None else None
    off_sums = on.empty(torch.float64, tiles**2)
    factors = (x.z_a, x.z_b, *x.views) if x.raw else x.views * 2
    tma = _use_tma(on.device, *factors)
    operands = [Block(t, blocks.k, blocks.m) if tma else t for t in factors]
    strides = [(*a.stride(), *b.stride()) for a, b in (factors[:2], factors[2:])]
    on.launch(
        *(_tuned(correlate_kernel, blocks), (tiles**2,)),
        *(*operands[:2], *strides[0], *operands[2:], *strides[1]),
        *(x.stats, c, pitch(c), row_sums, off_sums, n, d, configs.raw_limit(n)),
        RAW=x.raw,
        BLOCK=blocks.m,
        BLOCK_K=blocks.k,
        GROUP=8,
        EVEN=d % blocks.m == 0,
        TMA=tma,
        PRECISION=input_precision(precision),
        PADDED=x.hats is not None,
        **_options(blocks),
    )
    columns = 128
    on.launch(
        *(correlate_terms_kernel, (cdiv(d, columns) if row_sums is not None else 1,)),
        *(row_sums, off_sums, x.stats, x.sums, *terms, d, tiles, x.sums.shape[1], on.lambd, on.scale),
        BLOCK_D=columns,
        BLOCK_SUM=configs.SUM_BLOCK,
        num_warps=8,
    )


def input_grad(
    on: Recorder | Now,
    x: Normalized,
    product: Matrix,  # of gram or correlate
    route: str,
    g_terms: Sequence[Matrix | None],  # [] the gradients with respect to the terms
    grads: Sequence[Matrix | None],  # [N, D] out: dL/dz_a and dL/dz_b; None for one that is not wanted
    k_divisor: int,  # what K was divided by: D, of all features where x has a part of them
) -> None:
    """The gradients of the inputs, in their dtype."""
    if route == "gram":
        _gram_grad(on, x, product, g_terms, grads, k_divisor)
    else:
        _direct_grad(on, x, product, g_terms, grads)


def _gram_grad(
    on: Recorder | Now,
    x: Normalized,
    k: Matrix,
    g_terms: Sequence[Matrix | None],
    grads: Sequence[Matrix | None],
    k_divisor: int,
) -> None:
    n, d = x.z_a.shape
    normalized = x.normalization is not None
    chip = configs.chip(on.device)
    precision, blocks = chip.precision(x.dtype), chip.gram_grad(n, d, x.dtype, normalized)
    one_tile = not normalized or n <= blocks.m
    slabs = cdiv(d, blocks.n)
    views = [view for view in range(2) if grads[view] is not None]
    out = [grads[view] if grads[view] is not None else grads[views[0]] for view in range(2)]
    a_hat, b_hat = x.views
    tma = normalized and _use_tma(on.device, a_hat, k.unbind()[0])
    left = Block(k.flatten(0, 1), blocks.m, blocks.k) if tma else k
    right = Block(x.hats.flatten(0, 1), blocks.k, blocks.n) if tma else a_hat
    views_z = (x.z_a, x.z_b) if x.raw else x.views
    strides_z = (*views_z[0].stride(), *views_z[1].stride())
    of_product = {
        "BLOCK_M": blocks.m,
        "BLOCK_D": blocks.n,
        "BLOCK_K": blocks.k,
        "CHUNK": chunk(precision, n),
        "EVEN": d % blocks.n == 0,
        "TMA": tma,
        "PRECISION": input_precision(precision),
        "UNIT_STRIDE_GRAD": _unit_stride(*out),
    }
    if one_tile or _narrow(*out) or of_product["CHUNK"]:  # a second accumulator
        blocks = blocks.without_limit()
    if one_tile:
        on.launch(
            *(_tuned(gram_grad_kernel, blocks), (len(views) * slabs * cdiv(n, blocks.m),)),
            *(*views_z, *strides_z, right, b_hat, *a_hat.stride(), *b_hat.stride(), left, pitch(k), x.stats),
            *(*out, *out[0].stride(), *out[1].stride(), *g_terms, n, d, k_divisor),
            *(views[0], slabs, on.lambd, on.scale),
            NORMALIZED=normalized,
            RAW=x.raw,
            SHIFT=1 if normalized else 0,
            **of_product,
            NARROW=_narrow(*views_z, *out),
            UNIT_STRIDE=_unit_stride(*views_z),
            UNIT_STRIDE_RIGHT=_unit_stride(a_hat, b_hat),
            **_options(blocks),
        )
        return
    row_tiles = cdiv(n, blocks.m)
    at_once = min(slabs, cdiv(configs.grad_columns(n), blocks.n))
    row_sums = on.empty(torch.float32, 2, row_tiles, at_once * blocks.n)
    for first in range(0, slabs, at_once):
        count = min(at_once, slabs - first)
        on.launch(
            *(_tuned(grad_product_kernel, blocks), (len(views) * count * row_tiles,)),
            *(x.hats, pitch(x.hats), right, left, pitch(k), *out, *out[0].stride(), *out[1].stride(), row_sums),
            *(n, d, views[0], len(views), first, count),
            **of_product,
            NARROW=_narrow(*out),
            **_options(blocks),
        )
        rows = 128
        on.launch(
            *(grad_apply_kernel, (count, cdiv(n, rows))),
            *(*views_z, *strides_z, x.stats, *grads, *out[0].stride(), *out[1].stride(), row_sums, *g_terms),
            *(n, d, k_divisor, first, count, row_tiles, on.lambd, on.scale),
            RAW=x.raw,
            ROWS=rows,
            BLOCK_M=16,
            BLOCK_D=blocks.n,
            num_warps=4,
        )


def _direct_grad(
    on: Recorder | Now, x: Normalized, c: Matrix, g_terms: Sequence[Matrix | None], grads: Sequence[Matrix | None]
) -> None:
    n, d = x.z_a.shape
    chip = configs.chip(on.device)
    precision, blocks = chip.precision(x.dtype), chip.direct_grad(n, d, x.dtype)
    hats = x.views
    views_z = (x.z_a, x.z_b) if x.raw else hats
    for view, grad in enumerate(grads):
        if grad is None:
            continue
        own, other, left, right = views_z[view], views_z[1 - view], hats[1 - view], c
        strides = (*own.stride(), *other.stride())
        left_strides = left.stride()
        tma = _use_tma(on.device, left, right)
        if tma:
            left = Block(left, blocks.m, blocks.k)
            right = Block(c, *((blocks.k, blocks.n) if view else (blocks.n, blocks.k)))
        on.launch(
            *(_tuned(direct_grad_kernel, blocks), (cdiv(n, blocks.m) * cdiv(d, blocks.n),)),
            *(own, other, *strides, left, *left_strides, right, pitch(c), x.stats, grad, *grad.stride()),
            *(*g_terms, n, d, on.lambd, on.scale),
            VIEW=view,
            NORMALIZED=x.normalization is not None,
            RAW=x.raw,
            BLOCK_M=blocks.m,
            BLOCK_D=blocks.n,
            BLOCK_K=blocks.k,
            GROUP=8,
            EVEN=d % blocks.n == 0,
            NARROW=_narrow(own, other, grad),
            LEFT_K=d % blocks.k == 0 or x.hats is not None,
            RIGHT_K=d % blocks.k == 0 or view == 0,
            TMA=tma,
            PRECISION=input_precision(precision),
            **_options(blocks),
        )


_ROWS = (configs.stats_rows, configs.ROW_BYTES)
OPERATIONS = Operations("triton", Recorder, *_ROWS, normalize, gram, correlate, input_grad)
_passes = Passes(OPERATIONS)
forward, backward, empty_saved = _passes.forward, _passes.backward, _passes.empty_saved
planned, forget = _passes.planned, _passes.forget


def chunk(precision: str, length: int) -> int:
    """blocks.matmul's CHUNK for sums of ``length`` products."""
    return 0 if precision == "tf32x3" or length <= configs.CHUNK else configs.CHUNK


def input_precision(precision: str) -> str:
    """blocks.matmul's PRECISION."""
    return "ieee" if precision == "half" else precision


def pitch(x: Matrix | None) -> int:
    """How many numbers lie from one row to the next."""
    return 0 if x is None else x.stride(-2)


def _narrow(*matrices: Matrix) -> bool:
    """Whether a thread can load or store only one number of some of them at a time, which takes it more registers."""
    return any(t.stride(1) != 1 or t.stride(0) % 16 or not aligned(t) for t in matrices)


def _unit_stride(*tensors: Matrix) -> bool:
    """Whether features are contiguous in all of them."""
    return all(t.stride(1) == 1 for t in tensors)


def _use_tma(device: torch.device, *matrices: Matrix) -> bool:
    """Whether the tensor memory accelerator can load blocks of these matrices, and is worth its descriptors."""
    if not configs.has_tma(device) or matrices[0].numel() < configs.TMA_MIN_ELEMENTS:
        return False
    return all(t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and aligned(t) for t in matrices)


def _options(blocks: Blocks) -> dict[str, int]:
    return {} if configs.autotuned() else blocks.options()


def _tuned(kernel: Any, blocks: Blocks) -> Any:
    """The kernel, or where it is asked for one that measures num_stages for each shape first."""
    return _autotuner(kernel, blocks.num_warps, blocks.registers) if configs.autotuned() else kernel


@functools.cache
def _autotuner(kernel: Any, num_warps: int, registers: int) -> Any:
    """Stages alone: other warps add in another order, and ranks that measure apart must agree in every bit."""
    limit = None if registers == configs.MAX_REGISTERS else registers
    choices = [triton.Config({}, num_warps=num_warps, num_stages=s, maxnreg=limit) for s in (2, 3, 4)]
    key = ["N", "D", *(name for name in kernel.arg_names if name.isupper() and name not in ("N", "D"))]
    return triton.autotune(choices, key)(kernel)
