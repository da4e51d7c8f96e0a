"""direct_grad: one view's input gradient in the direct route, from A_hat, B_hat and C0. One launch a view.

For view a, with own = A_hat and other = B_hat (b: exchanged, and C0 transposed):

    P    = B_hat C0^T                                                                [N, D]
    grad = rstd * (alpha * P + d * other - kappa * m * own),     m = alpha * mean_n(own * P) + d * c
    alpha = (2 / N) * w_off,     d = (2 / N) * w_on * (c - 1)

    reads   z_a, z_b, B_hat [N, D], C0 [D, D], stats; the gradients of the terms (0-d, read here)
    writes  the gradient [N, D], in the inputs' dtype and strides
    FLOPs   2 N D^2
    bytes   N D + D^2 read for the product, through L2; 2 N D read and N D written by the epilogue

The idea: mean_n(A_hat_ni P_ni) = sum_j C0_ij^2, which ``correlate`` has added up while C was in registers. So every
tile finishes by itself, and the batch norm's backward costs an epilogue. As in gram_grad.py, in half precision that
epilogue standardises z (RAW) instead of reading the rounded A_hat and B_hat.
"""

# ruff: noqa: ANN001, ANN201, D103, N803 - the language of Triton kernels is not quite Python

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import KAPPA, MEAN, PRODUCT, RSTD, C, cast, halves, matmul, weights_of_sums


@triton.jit(do_not_specialize=["N"])
def direct_grad_kernel(
    own, other, own_n, own_d, other_n, other_d,  # for the epilogue: of z_a and z_b (RAW), or of A_hat and B_hat
    left, left_n, left_d,  # the other's A_hat or B_hat as operand: a pointer, or a descriptor of [BLOCK_M, BLOCK_K]
    right, right_pitch,  # C0: a pointer, or a descriptor of [BLOCK_D, BLOCK_K] (a) or [BLOCK_K, BLOCK_D] (b)
    stats,
    grad, grad_n, grad_d,
    g_loss, g_on, g_off,  # [] or None
    N, D, lambd, scale,
    VIEW: tl.constexpr, NORMALIZED: tl.constexpr, RAW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, NARROW: tl.constexpr,  # NARROW: rows of own, other, grad begin at any multiple of their dtype
    LEFT_K: tl.constexpr, RIGHT_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # GROUP rows of tiles at a time, so that programs that run together share their operands in L2.
    row_tiles = tl.cdiv(N, BLOCK_M)
    column_tiles = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    first = (pid // (GROUP * column_tiles)) * GROUP
    group = tl.minimum(row_tiles - first, GROUP)
    row = (first + (pid % (GROUP * column_tiles)) % group) * BLOCK_M
    column = ((pid % (GROUP * column_tiles)) // group) * BLOCK_D
    if TMA:
        p = matmul(
            left, 0, 0, row, N, right, 0, 0, 0, column, D, 0, D, D,
            BLOCK_M, BLOCK_D, BLOCK_K, 0, EVEN, LEFT_K, RIGHT_K, True, False, VIEW == 0, PRECISION,
        )  # fmt: skip
    elif VIEW == 0:
        p = matmul(
            left, left_n, left_d, row, N, right, 1, right_pitch, 0, column, D, 0, D, D,
            BLOCK_M, BLOCK_D, BLOCK_K, 0, EVEN, LEFT_K, RIGHT_K, False, False, True, PRECISION,
        )  # fmt: skip
    else:
        p = matmul(
            left, left_n, left_d, row, N, right, right_pitch, 1, 0, column, right_pitch, 0, D, D,
            BLOCK_M, BLOCK_D, BLOCK_K, 0, EVEN, LEFT_K, RIGHT_K, False, False, False, PRECISION,
        )  # fmt: skip

    # One half of the columns after the other, as in gram_grad.py.
    w_on, w_off = weights_of_sums(g_loss, g_on, g_off, lambd, scale)
    rows = row + tl.arange(0, BLOCK_M)
    p_left, p_right = halves(p)
    _finish(
        p_left, rows, column, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
        stats, w_on, w_off, N, D, VIEW, NORMALIZED, RAW, EVEN, NARROW,
    )  # fmt: skip
    _finish(
        p_right, rows, column + BLOCK_D // 2, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
        stats, w_on, w_off, N, D, VIEW, NORMALIZED, RAW, EVEN, NARROW,
    )  # fmt: skip


@triton.jit
def _finish(
    p, rows, column, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d, stats, w_on, w_off, N, D,
    VIEW: tl.constexpr, NORMALIZED: tl.constexpr, RAW: tl.constexpr, EVEN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Store a tile of the gradient, or one half of it after the other."""
    if NARROW:
        p_left, p_right = halves(p)
        _finish(
            p_left, rows, column, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
            stats, w_on, w_off, N, D, VIEW, NORMALIZED, RAW, EVEN, False,
        )  # fmt: skip
        _finish(
            p_right, rows, column + p_left.shape[1], own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
            stats, w_on, w_off, N, D, VIEW, NORMALIZED, RAW, EVEN, False,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, p.shape[1])
        _store(
            p, rows, columns, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d,
            stats, w_on, w_off, N, D, VIEW, NORMALIZED, RAW, EVEN,
        )  # fmt: skip


@triton.jit
def _store(
    p, rows, columns, own, own_n, own_d, other, other_n, other_d, grad, grad_n, grad_d, stats, w_on, w_off, N, D,
    VIEW: tl.constexpr, NORMALIZED: tl.constexpr, RAW: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store a tile of the gradient."""
    mask = (rows < N)[:, None]
    inside = None  # EVEN: D ends with a tile
    if not EVEN:
        inside = columns < D
        mask = mask & inside[None, :]
    tall = rows.to(tl.int64)[:, None]
    wide = columns.to(tl.int64)[None, :]
    row = stats + columns
    c = tl.load(row + C * D, mask=inside)
    alpha = (2.0 / N) * w_off
    d = (2.0 / N) * w_on * (c - 1.0)
    y = tl.load(other + tall * other_n + wide * other_d, mask=mask).to(tl.float32)
    if NORMALIZED:
        rstd = tl.load(row + (RSTD + VIEW) * D, mask=inside)
        kappa = tl.load(row + (KAPPA + VIEW) * D, mask=inside)
        mean = tl.load(row + (PRODUCT + VIEW) * D, mask=inside)
        w = -kappa * (alpha * mean + d * c)
        x = tl.load(own + tall * own_n + wide * own_d, mask=mask).to(tl.float32)
        if RAW:
            rstd_y = tl.load(row + (RSTD + 1 - VIEW) * D, mask=inside)
            x = x * rstd[None, :] - (rstd * tl.load(row + (MEAN + VIEW) * D, mask=inside))[None, :]
            y = y * rstd_y[None, :] - (rstd_y * tl.load(row + (MEAN + 1 - VIEW) * D, mask=inside))[None, :]
        g = p * (rstd * alpha)[None, :] + y * (rstd * d)[None, :] + x * (rstd * w)[None, :]
    else:
        g = p * alpha + y * d[None, :]
    tl.store(grad + tall * grad_n + wide * grad_d, cast(g, grad), mask=mask)
