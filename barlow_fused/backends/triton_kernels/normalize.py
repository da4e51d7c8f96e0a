"""normalize: every feature's mean and variance, A_hat and B_hat, and c = diag(C), from z_a and z_b.

    reads   z_a, z_b                        2 N D numbers, once (``normalize_kernel``) or twice (the two phases)
    writes  A_hat, B_hat                    2 N D numbers in the compute dtype, zeros up to the end of each padded row;
                                            nothing where nothing is standardised
            stats [1, 7 or 9; D] float32    the rows that blocks.py names
            sums [2, slabs] float64         each slab's sums of (c_i - 1)^2, the on-diagonal term, and of c_i^2
            counters                        zeros, for the kernel that comes next
    FLOPs   about 14 N D; the bytes are what it costs

The idea: a program holds all N samples of BLOCK_D features of both views in registers, so that the variance is the mean
of squares around the mean that was just computed, A_hat and c cost no second look at memory, and nothing is rounded to
the inputs' dtype before c is known. Beyond what registers hold, chunks of rows do the same, and their moments are
combined by Chan's formula in a fixed order: first all chunks' moments, then, from these, A_hat.

Every feature is first shifted by its own first sample, which is exact where samples are close to one another. What is
left has a mean of the size of its deviation, so a feature with |mean| / deviation = 1e3 loses nothing in float32, and
a constant one is exactly 0.
"""

# ruff: noqa: ANN001, ANN201, N803 - the language of Triton kernels is not quite Python

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import KAPPA, MEAN, RSTD, SQUARE, C, cast


@triton.jit(do_not_specialize=["counter_count", "N"])
def normalize_kernel(
    z_a, z_b, a_n, a_d, b_n, b_d,  # [N, D] and their strides
    a_hat, b_hat, pitch,  # [N, D], rows that begin pitch numbers apart
    stats, sums, counters, counter_count,
    N, D, eps, correction,
    NORMALIZE: tl.constexpr, EPS_IN_ROOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_COUNTERS: tl.constexpr,
):  # fmt: skip
    """A program: all samples, BLOCK_N >= N, of BLOCK_D features."""
    slab = tl.program_id(0)
    _zero_counters(counters, counter_count, slab, BLOCK_COUNTERS)
    columns = slab * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_N)
    a = _load(z_a, a_n, a_d, rows, columns, N, D)
    b = _load(z_b, b_n, b_d, rows, columns, N, D)
    if NORMALIZE:
        inside = (rows < N)[:, None]
        first_a, mean_a, a = _centre(z_a, a_d, a, columns, inside, N, D)
        first_b, mean_b, b = _centre(z_b, b_d, b, columns, inside, N, D)
        c, rstd_a, rstd_b = _finish(
            first_a + mean_a, first_b + mean_b, tl.sum(a * a, 0), tl.sum(b * b, 0), tl.sum(a * b, 0),
            stats, N, D, D, columns, eps, correction, EPS_IN_ROOT, a_hat.dtype.element_ty != tl.float32,
        )  # fmt: skip
        _store(a_hat, a * rstd_a[None, :], rows, columns, N, pitch)
        _store(b_hat, b * rstd_b[None, :], rows, columns, N, pitch)
    else:
        c = tl.sum(a * b, 0) / N
    _store_c(c, stats, sums, slab, tl.num_programs(0), columns, D)


@triton.jit(do_not_specialize=["N", "rows_per_chunk"])
def moments_kernel(
    z_a, z_b, a_n, a_d, b_n, b_d,
    partials,  # [chunks, 5, D] float32: each chunk's mean and sum of squares, a then b, and sum of products
    N, D, rows_per_chunk,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First phase. A program: one chunk of rows of BLOCK_D features."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = tl.program_id(1)
    begin = chunk * rows_per_chunk
    end = tl.minimum(begin + rows_per_chunk, N)
    count = 0.0
    mean_a = tl.zeros([BLOCK_D], tl.float32)
    mean_b = tl.zeros([BLOCK_D], tl.float32)
    m2_a = tl.zeros([BLOCK_D], tl.float32)
    m2_b = tl.zeros([BLOCK_D], tl.float32)
    cross = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = (rows < end)[:, None]
        here = tl.minimum(end - start, BLOCK_N).to(tl.float32)
        a = _load(z_a, a_n, a_d, rows, columns, end, D)
        b = _load(z_b, b_n, b_d, rows, columns, end, D)
        if NORMALIZE:
            _, here_a, a = _centre(z_a, a_d, a, columns, inside, here, D)
            _, here_b, b = _centre(z_b, b_d, b, columns, inside, here, D)
            mean_a, mean_b, m2_a, m2_b, cross = _merge(
                count, mean_a, mean_b, m2_a, m2_b, cross,
                here, here_a, here_b, tl.sum(a * a, 0), tl.sum(b * b, 0), tl.sum(a * b, 0),
            )  # fmt: skip
        else:
            cross += tl.sum(a * b, 0)
        count += here
    out = partials + chunk.to(tl.int64) * 5 * D + columns
    if NORMALIZE:
        tl.store(out, mean_a, mask=columns < D)
        tl.store(out + D, mean_b, mask=columns < D)
        tl.store(out + 2 * D, m2_a, mask=columns < D)
        tl.store(out + 3 * D, m2_b, mask=columns < D)
    tl.store(out + 4 * D, cross, mask=columns < D)


@triton.jit(do_not_specialize=["counter_count", "chunks", "N", "rows_per_chunk"])
def apply_moments_kernel(
    z_a, z_b, a_n, a_d, b_n, b_d,
    partials, chunks, a_hat, b_hat, pitch,
    stats, sums, counters, counter_count,
    N, D, rows_per_chunk, eps, correction,
    NORMALIZE: tl.constexpr, EPS_IN_ROOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_COUNTERS: tl.constexpr,
):  # fmt: skip
    """Second phase. A program combines its features' moments, and standardises one chunk of rows."""
    slab = tl.program_id(0)
    chunk = tl.program_id(1)
    columns = slab * BLOCK_D + tl.arange(0, BLOCK_D)
    mean_a = tl.zeros([BLOCK_D], tl.float32)
    mean_b = tl.zeros([BLOCK_D], tl.float32)
    m2_a = tl.zeros([BLOCK_D], tl.float32)
    m2_b = tl.zeros([BLOCK_D], tl.float32)
    cross = tl.zeros([BLOCK_D], tl.float32)
    count = 0.0
    for other in range(0, chunks):
        moments = partials + tl.cast(other, tl.int64) * 5 * D + columns
        here = tl.minimum(N - other * rows_per_chunk, rows_per_chunk).to(tl.float32)
        cross_here = tl.load(moments + 4 * D, mask=columns < D, other=0.0)
        if NORMALIZE:
            mean_a, mean_b, m2_a, m2_b, cross = _merge(
                count, mean_a, mean_b, m2_a, m2_b, cross, here,
                tl.load(moments, mask=columns < D, other=0.0),
                tl.load(moments + D, mask=columns < D, other=0.0),
                tl.load(moments + 2 * D, mask=columns < D, other=0.0),
                tl.load(moments + 3 * D, mask=columns < D, other=0.0),
                cross_here,
            )  # fmt: skip
        else:
            cross += cross_here
        count += here
    if chunk == 0:
        _zero_counters(counters, counter_count, slab, BLOCK_COUNTERS)
    if NORMALIZE:
        first_a = tl.load(z_a + columns.to(tl.int64) * a_d, mask=columns < D, other=0.0).to(tl.float32)
        first_b = tl.load(z_b + columns.to(tl.int64) * b_d, mask=columns < D, other=0.0).to(tl.float32)
        c, rstd_a, rstd_b = _finish(
            first_a + mean_a, first_b + mean_b, m2_a, m2_b, cross,
            stats, N, D, tl.where(chunk == 0, D, 0), columns, eps, correction,
            EPS_IN_ROOT, a_hat.dtype.element_ty != tl.float32,
        )  # fmt: skip
        begin = chunk * rows_per_chunk
        end = tl.minimum(begin + rows_per_chunk, N)
        for start in range(begin, end, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            a = _load(z_a, a_n, a_d, rows, columns, end, D)
            b = _load(z_b, b_n, b_d, rows, columns, end, D)
            a = (a - first_a[None, :] - mean_a[None, :]) * rstd_a[None, :]
            b = (b - first_b[None, :] - mean_b[None, :]) * rstd_b[None, :]
            _store(a_hat, a, rows, columns, end, pitch)
            _store(b_hat, b, rows, columns, end, pitch)
    else:
        c = cross / N
    if chunk == 0:
        _store_c(c, stats, sums, slab, tl.num_programs(0), columns, D)


@triton.jit
def _load(z, stride_n, stride_d, rows, columns, n, d):
    ptr = z + rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(ptr, mask=(rows < n)[:, None] & (columns < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(x_hat, x, rows, columns, n, pitch):
    ptr = x_hat + rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    tl.store(ptr, cast(x, x_hat), mask=(rows < n)[:, None] & (columns < pitch)[None, :])


@triton.jit
def _centre(z, stride_d, x, columns, inside, n, d):
    """The shift (each feature's first sample), the mean around it, and x less both, 0 outside."""
    first = tl.load(z + columns.to(tl.int64) * stride_d, mask=columns < d, other=0.0).to(tl.float32)
    x = tl.where(inside, x - first[None, :], 0.0)
    mean = tl.sum(x, 0) / n
    x = tl.where(inside, x - mean[None, :], 0.0)
    rest = tl.sum(x, 0) / n  # what rounding left of the mean
    return first, mean + rest, tl.where(inside, x - rest[None, :], 0.0)


@triton.jit
def _merge(n_1, a_1, b_1, aa_1, bb_1, ab_1, n_2, a_2, b_2, aa_2, bb_2, ab_2):
    """Chan's combination of two sets' means, sums of squares and sum of products."""
    share = n_2 / (n_1 + n_2)
    weight = n_1 * share
    delta_a = a_2 - a_1
    delta_b = b_2 - b_1
    return (
        a_1 + delta_a * share,
        b_1 + delta_b * share,
        aa_1 + aa_2 + delta_a * delta_a * weight,
        bb_1 + bb_2 + delta_b * delta_b * weight,
        ab_1 + ab_2 + delta_a * delta_b * weight,
    )


@triton.jit
def _finish(
    mean_a, mean_b, m2_a, m2_b, cross, stats, n, d, store_below, columns, eps, correction,
    EPS_IN_ROOT: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """rstd and c from means, sums of squares and of products; stores the features below ``store_below``."""
    rstd_a, kappa_a = _rstd_and_kappa(m2_a, n, eps, correction, EPS_IN_ROOT)
    rstd_b, kappa_b = _rstd_and_kappa(m2_b, n, eps, correction, EPS_IN_ROOT)
    mask = columns < store_below
    row = stats + columns
    stride = tl.cast(d, tl.int64)
    tl.store(row + RSTD * stride, rstd_a, mask=mask)
    tl.store(row + (RSTD + 1) * stride, rstd_b, mask=mask)
    tl.store(row + KAPPA * stride, kappa_a, mask=mask)
    tl.store(row + (KAPPA + 1) * stride, kappa_b, mask=mask)
    tl.store(row + SQUARE * stride, m2_a * rstd_a * rstd_a / n, mask=mask)
    tl.store(row + (SQUARE + 1) * stride, m2_b * rstd_b * rstd_b / n, mask=mask)
    if RAW:
        tl.store(row + MEAN * stride, mean_a, mask=mask)
        tl.store(row + (MEAN + 1) * stride, mean_b, mask=mask)
    rstd_a = tl.where(columns < d, rstd_a, 0.0)  # 1 / sqrt(eps) beyond D, which may be infinite
    rstd_b = tl.where(columns < d, rstd_b, 0.0)
    return cross * rstd_a * rstd_b / n, rstd_a, rstd_b


@triton.jit
def _rstd_and_kappa(m2, n, eps, correction, EPS_IN_ROOT: tl.constexpr):
    """normalization.py's table, from a feature's sum of squares."""
    one = tl.zeros_like(m2) + 1.0
    var = tl.div_rn(m2, one * (n - correction))  # a factor n / (n - correction) would be rounded alike in all features
    kappa = one * n / (n - correction)
    if EPS_IN_ROOT:
        rstd = tl.div_rn(one, tl.sqrt_rn(var + eps))
    else:
        std = tl.sqrt_rn(var)
        rstd = tl.div_rn(one, std + eps)
        kappa = tl.where(std > 0, kappa * tl.div_rn(std + eps, tl.where(std > 0, std, 1.0)), 0.0)
    return rstd, kappa


@triton.jit
def _store_c(c, stats, sums, slab, slabs, columns, d):
    inside = columns < d
    tl.store(stats + C * d + columns, c, mask=inside)
    exact = tl.where(inside, c, 0.0).to(tl.float64)
    error = tl.where(inside, exact - 1.0, 0.0)
    tl.store(sums + slab, tl.sum(error * error, 0))
    tl.store(sums + slabs + slab, tl.sum(exact * exact, 0))


@triton.jit
def _zero_counters(counters, count, slab, BLOCK: tl.constexpr):
    for start in range(slab * BLOCK, count, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(counters + offsets, tl.zeros([BLOCK], tl.int32), mask=offsets < count)
