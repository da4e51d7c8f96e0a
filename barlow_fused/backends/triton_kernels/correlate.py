"""correlate: C = A_hat^T B_hat / N, its sums, and the terms of the loss, in one pass over the inputs. Two launches.

    reads   z_a, z_b (or A_hat, B_hat) [N, D]; stats and sums of ``normalize``
    writes  C0 = C with its diagonal 0, [D, D] in the compute dtype, zeros up to the end of each padded row (only for a
            gradient; else C never reaches memory)
            the row and column sums of C0^2, the means that the batch norm's backward needs, into stats
            loss, on_diag, off_diag, float32
    FLOPs   2 N D^2
    bytes   2 N D read, about ceil(D / BLOCK) times through L2; D^2 written; D^2 / BLOCK * 8 of partial sums

The idea: half-precision inputs need no standardised copy. The tensor cores multiply z itself, products of halves are
exact in float32, and the epilogue centres and scales: C_ij = (sum_n a_ni b_nj / N - mu_i mu_j) s_i s_j. That is more
accurate than rounding A_hat, until mu_i mu_j is so large that the difference cancels: its error is about
6e-8 * |mu_i mu_j| s_i s_j, and 1e-9 * N of that where the tensor cores truncate (blocks.py). Each tile looks at its own
features and multiplies A_hat and B_hat where that product may exceed ``raw_limit``. float32 inputs,
whose products are not exact, always take A_hat and B_hat.

The second, small kernel adds the partial sums in a fixed order and writes the terms.
"""

# ruff: noqa: ANN001, ANN201, D103, N803 - the language of Triton kernels is not quite Python

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import MEAN, PRODUCT, RSTD, cast, halves, matmul, store_terms, sum_all


@triton.jit(do_not_specialize=["N"])
def correlate_kernel(
    z_a, z_b, z_a_n, z_a_d, z_b_n, z_b_d,  # the raw inputs: pointers and strides, or descriptors of [BLOCK_K, BLOCK]
    a, b, a_n, a_d, b_n, b_d,  # A_hat and B_hat, likewise
    stats,
    c_out, c_pitch,  # [D, D], rows that begin c_pitch numbers apart; or None
    row_sums,  # [2, T, D] float32: of C0^2 over a tile's columns, and over its rows; None without gradient
    off_sums,  # [T * T] float64
    N, D, raw_limit,
    RAW: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    PADDED: tl.constexpr,  # zeros follow D up to the end of each row of A_hat and B_hat
):  # fmt: skip
    # GROUP rows of tiles at a time, so that programs that run together share their operands in L2.
    tiles = tl.cdiv(D, BLOCK)
    pid = tl.program_id(0)
    first = (pid // (GROUP * tiles)) * GROUP
    group = tl.minimum(tiles - first, GROUP)
    tile_i = first + (pid % (GROUP * tiles)) % group
    tile_j = (pid % (GROUP * tiles)) // group
    i = tile_i * BLOCK + tl.arange(0, BLOCK)
    columns = a_n if PADDED else D  # a multiple of 16, up to which 16 bytes can be loaded at once whatever D is
    if RAW:
        j = tile_j * BLOCK + tl.arange(0, BLOCK)
        row = stats + i
        mean_i = tl.load(row + MEAN * D, mask=i < D, other=0.0)
        rstd_i = tl.load(row + RSTD * D, mask=i < D, other=0.0)
        row = stats + j
        mean_j = tl.load(row + (MEAN + 1) * D, mask=j < D, other=0.0)
        rstd_j = tl.load(row + (RSTD + 1) * D, mask=j < D, other=0.0)
        if tl.max(tl.abs(mean_i * rstd_i), 0) * tl.max(tl.abs(mean_j * rstd_j), 0) <= raw_limit:
            c = matmul(
                z_a, z_a_d, z_a_n, tile_i * BLOCK, D, z_b, z_b_n, z_b_d, 0, tile_j * BLOCK, D, 0, N, N,
                BLOCK, BLOCK, BLOCK_K, 0, EVEN, False, False, TMA, True, False, PRECISION,
            )  # fmt: skip
            c = (c / N - mean_i[:, None] * mean_j[None, :]) * (rstd_i[:, None] * rstd_j[None, :])
        else:
            c = matmul(
                a, a_d, a_n, tile_i * BLOCK, columns, b, b_n, b_d, 0, tile_j * BLOCK, columns, 0, N, N,
                BLOCK, BLOCK, BLOCK_K, 0, EVEN, False, False, TMA, True, False, PRECISION,
            )  # fmt: skip
            c = c / N
    else:
        c = matmul(
            a, a_d, a_n, tile_i * BLOCK, columns, b, b_n, b_d, 0, tile_j * BLOCK, columns, 0, N, N,
            BLOCK, BLOCK, BLOCK_K, 0, EVEN, False, False, TMA, True, False, PRECISION,
        )  # fmt: skip
        c = c / N

    # One half of the columns after the other, as in gram_grad.py.
    left, right = halves(c)
    j = tile_j * BLOCK + tl.arange(0, BLOCK // 2)
    row_sums_j = None
    if row_sums is not None:
        row_sums_j = row_sums + (tiles + tile_i).to(tl.int64) * D
    over_columns = _finish(left, i, j, c_out, c_pitch, row_sums_j, D)
    over_columns += _finish(right, i, j + BLOCK // 2, c_out, c_pitch, row_sums_j, D)
    if row_sums is not None:
        tl.store(row_sums + tile_j.to(tl.int64) * D + i, over_columns, mask=i < D)
    off_sum = tl.sum(over_columns.to(tl.float64), 0)
    tl.store(off_sums + tile_i * tiles + tile_j, off_sum)


@triton.jit
def _finish(c, i, j, c_out, c_pitch, row_sums_j, D):
    """Store a tile of C0 and the sums of C0^2 over its rows; return the sums over its columns."""
    inside = (i < D)[:, None] & (j < D)[None, :]
    c = tl.where(inside & (i[:, None] != j[None, :]), c, 0.0)
    if c_out is not None:
        stored = (i < D)[:, None] & (j < c_pitch)[None, :]
        tl.store(c_out + i.to(tl.int64)[:, None] * c_pitch + j[None, :], cast(c, c_out), mask=stored)
    squares = c * c
    if row_sums_j is not None:
        tl.store(row_sums_j + j, tl.sum(squares, 0), mask=j < D)
    return tl.sum(squares, 1)


@triton.jit(do_not_specialize=["slabs"])
def correlate_terms_kernel(
    row_sums, off_sums, stats, sums, loss, on_diag, off_diag, D, tiles, slabs, lambd, scale,
    BLOCK_D: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_D features' row and column sums; program 0 also the terms."""
    pid = tl.program_id(0)
    if row_sums is not None:
        columns = pid * BLOCK_D + tl.arange(0, BLOCK_D)
        over_columns = tl.zeros([BLOCK_D], tl.float32)
        over_rows = tl.zeros([BLOCK_D], tl.float32)
        ptr = row_sums + columns
        for _ in range(0, tiles):
            over_columns += tl.load(ptr, mask=columns < D, other=0.0)
            over_rows += tl.load(ptr + tl.cast(tiles, tl.int64) * D, mask=columns < D, other=0.0)
            ptr += D
        tl.store(stats + PRODUCT * D + columns, over_columns, mask=columns < D)
        tl.store(stats + (PRODUCT + 1) * D + columns, over_rows, mask=columns < D)
    if pid == 0:
        on_sum, _squares, off_sum = sum_all(sums, slabs, off_sums, tiles * tiles, BLOCK_SUM)
        store_terms(on_sum, off_sum, lambd, scale, loss, on_diag, off_diag)
