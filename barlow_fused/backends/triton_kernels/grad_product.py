"""gram_grad where N is several tiles: P and its sums, then what is elementwise. Two launches for both views.

gram_grad.py has the formula. mean_n(own * q) needs all samples of a feature, so a first kernel stores P, scaled, in
the gradient's own memory, and each row tile's sums of own * P; a second one adds the sums up, in the order of the
tiles, and makes the gradient in place. mean_n(own * other) is c, which is known.

    grad_product    reads   A_hat, B_hat [N, D], K [2, N, N]
                    writes  P / sqrt(N) into both gradients [N, D]; row_sums [2, row tiles, columns] float32
    grad_apply      reads   z_a, z_b (in float32 A_hat, B_hat), P, row_sums, stats; the gradients of the terms
                    writes  both gradients [N, D]
    FLOPs           4 N^2 D for both views
    bytes           2 N D read and 2 N D written, K from L2; then 4 N D read and 2 N D written

Every tile is a program: the chip is full whatever D is, and two programs share a multiprocessor, so that one's epilogue
hides behind the other's product. The order is that of memory, all rows of a slab in both views and then the next slab;
the second kernel begins at the last slab, a part of which L2 still holds.

P is rounded to the gradient's dtype once, by no more than K's and A_hat's rounding have left in it already; the scale
keeps float16 from overflowing where one sample is all that features have in common. The row sums are made before that.
Where D is many times N, some columns are finished before the next: the sums take half the memory of K then.
"""

# ruff: noqa: ANN001, ANN201, N803, SIM108 - the language of Triton kernels is not quite Python

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import KAPPA, MEAN, RSTD, SQUARE, C, cast, halves, weights_of_sums
from .gram_grad import gram_grad_product


@triton.jit(do_not_specialize=["N", "first_view", "views", "first_slab", "slabs"])
def grad_product_kernel(
    hats, pitch,  # [2, N, D], rows that begin pitch numbers apart
    right,  # hats; with TMA a descriptor of [BLOCK_K, BLOCK_D] blocks of [2 N, D]
    k, k_pitch,  # K_a and K_b, as gram_grad_kernel takes them
    grad_a, grad_b, grad_a_n, grad_a_d, grad_b_n, grad_b_d,  # a gradient that is not wanted is never touched
    row_sums,  # [2, row tiles, slabs * BLOCK_D]
    N, D, first_view, views, first_slab, slabs,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    NARROW: tl.constexpr,  # rows of the gradients begin at any multiple of their dtype
    UNIT_STRIDE_GRAD: tl.constexpr,  # along D
):  # fmt: skip
    """A program: a tile of one view."""
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(N, BLOCK_M)
    row_tile = pid % row_tiles
    view = first_view + (pid // row_tiles) % views
    slab = pid // (row_tiles * views)
    row = row_tile * BLOCK_M
    column = (first_slab + slab) * BLOCK_D
    is_a = view == 0
    own = hats + view.to(tl.int64) * N * pitch
    if TMA:
        a_right = right
        b_right = right
    else:
        a_right = own
        b_right = own
    p = gram_grad_product(
        is_a, row, column, a_right, b_right, pitch, 1, pitch, 1, k, k_pitch, N, D,
        BLOCK_M, BLOCK_D, BLOCK_K, CHUNK, EVEN, True, TMA, True, PRECISION,
    )  # fmt: skip
    grad = tl.where(is_a, grad_a, grad_b)
    grad_n = tl.where(is_a, grad_a_n, grad_b_n)
    if UNIT_STRIDE_GRAD:
        grad_d = 1
    else:
        grad_d = tl.where(is_a, grad_a_d, grad_b_d)
    rows = row + tl.arange(0, BLOCK_M)
    sums = row_sums + ((view * row_tiles + row_tile).to(tl.int64) * slabs + slab) * BLOCK_D
    left, other_half = halves(p)
    _finish(left, rows, column, 0, own, pitch, grad, grad_n, grad_d, sums, N, D, EVEN, NARROW)
    _finish(other_half, rows, column, BLOCK_D // 2, own, pitch, grad, grad_n, grad_d, sums, N, D, EVEN, NARROW)


@triton.jit
def _finish(
    p, rows, column, offset, own, pitch, grad, grad_n, grad_d, sums, N, D, EVEN: tl.constexpr, NARROW: tl.constexpr
):  # fmt: skip
    """Store a part of a tile of P, or one half of it after the other, as gram_grad.py does."""
    if NARROW:
        left, right = halves(p)
        _finish(left, rows, column, offset, own, pitch, grad, grad_n, grad_d, sums, N, D, EVEN, False)
        offset += left.shape[1]
        _finish(right, rows, column, offset, own, pitch, grad, grad_n, grad_d, sums, N, D, EVEN, False)
    else:
        _store(p, rows, column, offset, own, pitch, grad, grad_n, grad_d, sums, N, D, EVEN)


@triton.jit
def _store(p, rows, column, offset, own, pitch, grad, grad_n, grad_d, sums, N, D, EVEN: tl.constexpr):
    """A part of a tile of P, and the sums of own * P over its rows."""
    within = offset + tl.arange(0, p.shape[1])
    columns = column + within
    tall = rows.to(tl.int64)[:, None]
    ptr = own + tall * pitch + columns[None, :]
    stored = grad + tall * grad_n + columns.to(tl.int64)[None, :] * grad_d
    inside = (rows < N)[:, None]
    loaded = inside
    if not EVEN:
        loaded = inside & (columns < pitch)[None, :]
        inside = inside & (columns < D)[None, :]
    x = tl.load(ptr, mask=loaded, other=0.0)
    tl.store(stored, cast(p / tl.sqrt(N * 1.0), grad), mask=inside)
    tl.store(sums + within, tl.sum(x.to(tl.float32) * p, 0))


@triton.jit(do_not_specialize=["N", "k_divisor", "first_slab", "slabs", "row_tiles"])
def grad_apply_kernel(
    a, b, a_n, a_d, b_n, b_d,  # z_a and z_b (RAW), or A_hat and B_hat; their strides
    stats,
    grad_a, grad_b, grad_a_n, grad_a_d, grad_b_n, grad_b_d,  # P / sqrt(N), which becomes the gradient; or None
    row_sums,  # [2, row_tiles, slabs * BLOCK_D]
    g_loss, g_on, g_off,  # [] or None
    N, D, k_divisor, first_slab, slabs, row_tiles, lambd, scale,
    RAW: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of a slab in both views, BLOCK_M at a time."""
    slab = slabs - 1 - tl.program_id(0)
    first_row = tl.program_id(1) * ROWS
    within = tl.arange(0, BLOCK_D)
    columns = (first_slab + slab) * BLOCK_D + within
    inside = columns < D
    w_on, w_off = weights_of_sums(g_loss, g_on, g_off, lambd, scale)
    c = tl.load(stats + C * D + columns, mask=inside, other=0.0)
    alpha = w_off * (2.0 / N) * (k_divisor * 1.0 / N)
    d = (2.0 / N) * (w_on * (c - 1.0) - w_off * c)
    rstd_a, mean_a = _standard(stats, 0, columns, inside, D, RAW)
    rstd_b, mean_b = _standard(stats, 1, columns, inside, D, RAW)
    sums = row_sums + slab * BLOCK_D + within
    stride = slabs * BLOCK_D
    if grad_a is not None:
        of_p_a, of_own_a, of_other_a = _factors(
            0, sums, stride, stats, columns, inside, c, alpha, d, rstd_a, rstd_b, row_tiles, N, D, RAW
        )
    if grad_b is not None:
        of_p_b, of_own_b, of_other_b = _factors(
            1, sums, stride, stats, columns, inside, c, alpha, d, rstd_b, rstd_a, row_tiles, N, D, RAW
        )
    wide = columns.to(tl.int64)[None, :]
    for row in range(first_row, tl.minimum(first_row + ROWS, N), BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        mask = (rows < N)[:, None] & inside[None, :]
        tall = rows.to(tl.int64)[:, None]
        x_a = tl.load(a + tall * a_n + wide * a_d, mask=mask, other=0.0).to(tl.float32)
        x_b = tl.load(b + tall * b_n + wide * b_d, mask=mask, other=0.0).to(tl.float32)
        if RAW:
            x_a -= mean_a[None, :]
            x_b -= mean_b[None, :]
        if grad_a is not None:
            ptr = grad_a + tall * grad_a_n + wide * grad_a_d
            p = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
            g = p * of_p_a[None, :] + x_b * of_other_a[None, :] + x_a * of_own_a[None, :]
            tl.store(ptr, cast(g, grad_a), mask=mask)
        if grad_b is not None:
            ptr = grad_b + tall * grad_b_n + wide * grad_b_d
            p = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
            g = p * of_p_b[None, :] + x_a * of_other_b[None, :] + x_b * of_own_b[None, :]
            tl.store(ptr, cast(g, grad_b), mask=mask)


@triton.jit
def _standard(stats, view, columns, inside, D, RAW: tl.constexpr):
    """One view's 1 / deviation, and its mean where z is standardised again."""
    row = stats + view * D + columns
    rstd = tl.load(row + RSTD * D, mask=inside, other=0.0)
    mean = 0.0
    if RAW:
        mean = tl.load(row + MEAN * D, mask=inside, other=0.0)
    return rstd, mean


@triton.jit
def _factors(
    view, sums, stride, stats, columns, inside, c, alpha, d, rstd, rstd_other, row_tiles, N, D, RAW: tl.constexpr
):  # fmt: skip
    """What one view's P, own and other are multiplied by; RAW: own and other are z less its mean."""
    own_p = tl.zeros_like(c)
    ptr = sums + view * row_tiles.to(tl.int64) * stride
    for _ in tl.range(0, row_tiles, loop_unroll_factor=4):
        own_p += tl.load(ptr)
        ptr += stride
    row = stats + view * D + columns
    kappa = tl.load(row + KAPPA * D, mask=inside, other=0.0)
    square = tl.load(row + SQUARE * D, mask=inside, other=0.0)
    of_own = alpha * (1.0 - kappa * square) - kappa * (alpha * own_p / N + d * c)
    of_other = d
    if RAW:
        of_own *= rstd
        of_other *= rstd_other
    return rstd * alpha * tl.sqrt(N * 1.0), rstd * of_own, rstd * of_other
