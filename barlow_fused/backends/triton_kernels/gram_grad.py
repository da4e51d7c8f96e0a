"""gram_grad: the input gradients of the Gram route, from A_hat, B_hat and K, where N is one tile. One launch.

For view a, with own = A_hat, other = B_hat, and one number a feature for everything but own, other and P:

    P    = (K_b / D - shift * I) A_hat                                              [N, D]
    q    = rstd * (alpha * P + d * other)
    grad = q + rstd * alpha * shift * own - kappa * m * own
    m    = mean_n(own * q) + rstd * alpha * shift * mean_n(own^2)
    alpha = w_off * (2 / N) * (D / N),    d = (2 / N) * (w_on * (c - 1) - w_off * c)

    reads   z_a, z_b, A_hat, B_hat [N, D], K [2, N, N], stats; the gradients of the terms (0-d, read here)
    writes  both gradients [N, D], in the inputs' dtype and strides
    FLOPs   4 N^2 D for both views
    bytes   6 N D read in half precision (4 N D in float32), K from L2, and 2 N D written

The idea: mean_n(own * q) needs all samples of a feature before one number of its gradient is known. Up to BLOCK_M
samples a program owns a slab of columns with all N rows, and P waits in registers. grad_product.py has more rows.

In half precision the epilogue standardises z once more instead of reading A_hat and B_hat (RAW): with c near 1 the
gradient holds the small difference d * (B_hat - c * A_hat), which their rounding would drown. Only P is made of rounded
numbers then.

Without standardisation (NORMALIZED = False) no mean is needed, and each row tile is a program of its own.
"""

# ruff: noqa: ANN001, ANN201, D103, N803, SIM108 - the language of Triton kernels is not quite Python

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import KAPPA, MEAN, RSTD, SQUARE, C, cast, halves, matmul, weights_of_sums


@triton.jit(do_not_specialize=["N", "k_divisor", "first_view", "slabs"])
def gram_grad_kernel(
    a, b, a_n, a_d, b_n, b_d,  # for the epilogue: z_a and z_b (RAW), or A_hat and B_hat; their strides
    a_right, b_right, a_right_n, a_right_d, b_right_n, b_right_d,  # A_hat and B_hat as right operands; with TMA
    # a_right is a descriptor of [BLOCK_K, BLOCK_D] blocks of both, [2 N, D]
    k, k_pitch,  # K_a and K_b, [2, N, N], rows k_pitch numbers apart; with TMA a descriptor of [BLOCK_M, BLOCK_K]
    # blocks of [2 N, N]
    stats,
    grad_a, grad_b, grad_a_n, grad_a_d, grad_b_n, grad_b_d,  # a gradient that is not wanted is never touched
    g_loss, g_on, g_off,  # [] or None
    N, D, k_divisor,  # K's D: that of all ranks, where a rank has a part of the features
    first_view, slabs, lambd, scale,
    NORMALIZED: tl.constexpr, RAW: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    NARROW: tl.constexpr,  # rows of a, b and the gradients begin at any multiple of their dtype
    UNIT_STRIDE: tl.constexpr, UNIT_STRIDE_RIGHT: tl.constexpr, UNIT_STRIDE_GRAD: tl.constexpr,  # along D
):  # fmt: skip
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(N, BLOCK_M)  # 1 where features are standardised
    row = (pid % row_tiles) * BLOCK_M
    column = ((pid // row_tiles) % slabs) * BLOCK_D
    view = first_view + pid // (row_tiles * slabs)
    is_a = view == 0
    w_on, w_off = weights_of_sums(g_loss, g_on, g_off, lambd, scale)
    own = tl.where(is_a, a, b)
    own_n = tl.where(is_a, a_n, b_n)
    other = tl.where(is_a, b, a)
    other_n = tl.where(is_a, b_n, a_n)
    grad = tl.where(is_a, grad_a, grad_b)
    grad_n = tl.where(is_a, grad_a_n, grad_b_n)
    if UNIT_STRIDE:  # known to the compiler, which then loads 16 bytes at once
        own_d = 1
        other_d = 1
    else:
        own_d = tl.where(is_a, a_d, b_d)
        other_d = tl.where(is_a, b_d, a_d)
    if UNIT_STRIDE_GRAD:
        grad_d = 1
    else:
        grad_d = tl.where(is_a, grad_a_d, grad_b_d)
    p = gram_grad_product(
        is_a, row, column, a_right, b_right, a_right_n, a_right_d, b_right_n, b_right_d, k, k_pitch, N, D,
        BLOCK_M, BLOCK_D, BLOCK_K, CHUNK, EVEN, NORMALIZED, TMA, UNIT_STRIDE_RIGHT, PRECISION,
    )  # fmt: skip

    # The epilogue takes one half of the columns after the other: numbers that belong to a feature, of which a thread
    # needs as many as it has columns, would not fit its registers otherwise.
    rows = row + tl.arange(0, BLOCK_M)
    p_left, p_right = halves(p)
    _finish(
        p_left, rows, column, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
        stats, view, w_on, w_off, N, D, k_divisor, NORMALIZED, RAW, SHIFT, EVEN, NARROW,
    )  # fmt: skip
    _finish(
        p_right, rows, column + BLOCK_D // 2, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
        stats, view, w_on, w_off, N, D, k_divisor, NORMALIZED, RAW, SHIFT, EVEN, NARROW,
    )  # fmt: skip


@triton.jit
def _finish(
    p, rows, column, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
    stats, view, w_on, w_off, N, D, k_divisor,
    NORMALIZED: tl.constexpr, RAW: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Store a tile of the gradient, or one half of it after the other."""
    if NARROW:
        p_left, p_right = halves(p)
        _finish(
            p_left, rows, column, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
            stats, view, w_on, w_off, N, D, k_divisor, NORMALIZED, RAW, SHIFT, EVEN, False,
        )  # fmt: skip
        _finish(
            p_right, rows, column + p_left.shape[1], own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
            stats, view, w_on, w_off, N, D, k_divisor, NORMALIZED, RAW, SHIFT, EVEN, False,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, p.shape[1])
        _store(
            p, rows, columns, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
            stats, view, w_on, w_off, N, D, k_divisor, NORMALIZED, RAW, SHIFT, EVEN,
        )  # fmt: skip


@triton.jit
def _store(
    p, rows, columns, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
    stats, view, w_on, w_off, N, D, k_divisor,
    NORMALIZED: tl.constexpr, RAW: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store a tile of the gradient; NORMALIZED: one with all rows."""
    mask = (rows < N)[:, None]
    inside = None  # EVEN: D ends with a tile
    if not EVEN:
        inside = columns < D
        mask = mask & inside[None, :]
    tall = rows.to(tl.int64)[:, None]
    wide = columns.to(tl.int64)[None, :]
    c = tl.load(stats + C * D + columns, mask=inside)
    alpha = w_off * (2.0 / N) * (k_divisor * 1.0 / N)
    d = (2.0 / N) * (w_on * (c - 1.0) - w_off * c)
    y = tl.load(other + tall * other_n + wide * other_d, mask=mask, other=0.0).to(tl.float32)
    if NORMALIZED:
        row = stats + view.to(tl.int64) * D + columns
        rstd = tl.load(row + RSTD * D, mask=inside)
        kappa = tl.load(row + KAPPA * D, mask=inside)
        square = tl.load(row + SQUARE * D, mask=inside)
        d *= rstd
        alpha *= rstd
        if RAW:  # y is z: d * y_hat = (d * rstd) * y - d * rstd * mean
            row_y = stats + (1 - view).to(tl.int64) * D + columns
            factor = d * tl.load(row_y + RSTD * D, mask=inside)
            q = p * alpha[None, :] + (y * factor[None, :] - (factor * tl.load(row_y + MEAN * D, mask=inside))[None, :])
        else:
            q = p * alpha[None, :] + y * d[None, :]
        x = tl.load(own + tall * own_n + wide * own_d, mask=mask, other=0.0).to(tl.float32)
        if RAW:
            x = x * rstd[None, :] - (rstd * tl.load(row + MEAN * D, mask=inside))[None, :]
            x = tl.where(mask, x, 0.0)
        mean = tl.sum(x * q, 0) / N
        g = q + x * (alpha * SHIFT * (1.0 - kappa * square) - kappa * mean)[None, :]
    else:
        g = p * alpha + y * d[None, :]
    tl.store(grad + tall * grad_n + wide * grad_d, cast(g, grad), mask=mask)


@triton.jit
def gram_grad_product(
    is_a, row, column, a_right, b_right, a_right_n, a_right_d, b_right_n, b_right_d, k, k_pitch, N, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    EVEN: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr, UNIT_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A [BLOCK_M, BLOCK_D] tile of P."""
    if TMA:
        own_row = tl.where(is_a, 0, N)
        p = matmul(
            k, 0, 0, N - own_row + row, 2 * N, a_right, 0, 0, own_row, column, D, 0, N, N,
            BLOCK_M, BLOCK_D, BLOCK_K, CHUNK, EVEN, True, False, True, False, False, PRECISION,
        )  # fmt: skip
    else:
        if UNIT_STRIDE:
            right_d = 1
        else:
            right_d = tl.where(is_a, a_right_d, b_right_d)
        right_n = tl.where(is_a, a_right_n, b_right_n)
        if PADDED:  # columns up to a multiple of 16 can be loaded, 16 bytes at once
            columns = right_n
        else:
            columns = D
        p = matmul(
            k + tl.where(is_a, tl.cast(N, tl.int64) * k_pitch, 0), k_pitch, 1, row, N,
            tl.where(is_a, a_right, b_right), right_n, right_d, 0, column, columns, 0, N, N,
            BLOCK_M, BLOCK_D, BLOCK_K, CHUNK, EVEN, True, False, False, False, False, PRECISION,
        )  # fmt: skip
    return p
