"""What several kernels are built of: a tile of a matrix product, sums in a fixed order, the rows of ``stats``."""

# ruff: noqa: ANN001, ANN201, N803, SIM108 - the language of Triton kernels is not quite Python

from __future__ import annotations

import triton
import triton.language as tl

# The rows of ``stats``, float32; view a stands before view b. configs.stats_rows says how many there are.
C = tl.constexpr(0)  # diag(C)
RSTD = tl.constexpr(1)
KAPPA = tl.constexpr(3)
SQUARE = tl.constexpr(5)  # mean_n(A_hat^2) = variance * rstd^2, for the Gram route; the direct route writes over it:
PRODUCT = tl.constexpr(5)  # mean_n(A_hat * P), the row sums of C0^2 (view b: the column sums)
MEAN = tl.constexpr(7)  # where z is standardised again: not in float32

# Triton's interpreter computes in numpy, which has no bfloat16: it truncates where a GPU rounds, and tl.dot multiplies
# the bits as integers. ``cast`` and ``_dot`` say there what a GPU does.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


if hasattr(tl, "barrier"):  # the name in newer Triton

    @triton.jit
    def barrier():
        """All of a program's threads wait for one another, and see what these have stored."""
        tl.barrier()

else:

    @triton.jit
    def barrier():
        """All of a program's threads wait for one another, and see what these have stored."""
        tl.debug_barrier()


@triton.jit
def matmul(
    left,  # [m_size, K]: a pointer, or with TMA a descriptor of [BLOCK_M, BLOCK_K] blocks (LEFT_KM: of the transpose)
    left_m,  # strides of a pointer; with TMA unused
    left_k,
    row,  # the tile's first row
    m_size,
    right,  # [K, n_size]: a pointer, or a descriptor of [BLOCK_K, BLOCK_N] blocks (RIGHT_NK: of the transpose)
    right_k,
    right_n,
    right_first,  # with TMA: the row (RIGHT_NK: column) of the descriptor's matrix that stands for k = 0
    column,  # the tile's first column
    n_size,
    k_begin,  # the part of K that is summed: whole blocks, but for the last of K
    k_end,
    k_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,  # no tile passes the end of an operand that lies column by column
    LEFT_K: tl.constexpr,  # no block of left passes the end of K, or zeros follow it there
    RIGHT_K: tl.constexpr,
    TMA: tl.constexpr,
    LEFT_KM: tl.constexpr,  # how left lies in memory: [K, m_size], and not [m_size, K]
    RIGHT_NK: tl.constexpr,
    PRECISION: tl.constexpr,
    SYMMETRIC: tl.constexpr = False,  # right is left's transpose, and what is there of left: it is loaded once
):
    """A [BLOCK_M, BLOCK_N] tile of left @ right in float32; its rows and columns past the end are arbitrary.

    Past the end of an operand that lies row by row stands its last row again, which costs no mask.

    Tensor cores truncate each sum that they add to. Over K products of one sign in half precision, 16 an addition, that
    loses about 1e-9 * K of the result: 3e-4 of the diagonal of K_a at D = 262 144. With CHUNK > 0 every CHUNK products
    start a sum of their own, and these are added with rounding. "tf32x3" does that by itself in every block.
    """
    if CHUNK == 0:
        total = _matmul_chunk(
            left, left_m, left_k, row, m_size, right, right_k, right_n, right_first, column, n_size,
            k_begin, k_end, k_size, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, LEFT_K, RIGHT_K, TMA, LEFT_KM, RIGHT_NK, PRECISION,
            SYMMETRIC,
        )  # fmt: skip
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for chunk in range(k_begin, k_end, CHUNK):
            total += _matmul_chunk(
                left, left_m, left_k, row, m_size, right, right_k, right_n, right_first, column, n_size,
                chunk, tl.minimum(chunk + CHUNK, k_end), k_size,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN, LEFT_K, RIGHT_K, TMA, LEFT_KM, RIGHT_NK, PRECISION, SYMMETRIC,
            )  # fmt: skip
    return total


@triton.jit
def _matmul_chunk(
    left, left_m, left_k, row, m_size, right, right_k, right_n, right_first, column, n_size, k_begin, k_end, k_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    LEFT_K: tl.constexpr, RIGHT_K: tl.constexpr, TMA: tl.constexpr, LEFT_KM: tl.constexpr, RIGHT_NK: tl.constexpr,
    PRECISION: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for k in range(k_begin, k_end, BLOCK_K):
            x = tl.trans(left.load([k, row])) if LEFT_KM else left.load([row, k])
            if SYMMETRIC:
                y = tl.trans(x)
            elif RIGHT_NK:
                y = tl.trans(right.load([column, right_first + k]))
            else:
                y = right.load([right_first + k, column])
            acc = _dot(x, y, acc, PRECISION)
    else:
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        left_inside = None
        right_inside = None
        if not LEFT_KM:
            rows = tl.minimum(rows, m_size - 1)
        elif not EVEN:
            left_inside = (rows < m_size)[:, None]
        if RIGHT_NK:
            columns = tl.minimum(columns, n_size - 1)
        elif not EVEN:
            right_inside = (columns < n_size)[None, :]
        ks = tl.arange(0, BLOCK_K)
        first = (k_begin + ks).to(tl.int64)
        x_ptr = left + rows.to(tl.int64)[:, None] * left_m + first[None, :] * left_k
        y_ptr = right + first[:, None] * right_k + columns.to(tl.int64)[None, :] * right_n
        left_step = tl.cast(left_k, tl.int64) * BLOCK_K
        right_step = tl.cast(right_k, tl.int64) * BLOCK_K
        for k in range(k_begin, k_end, BLOCK_K):
            x = _load(x_ptr, left_inside, (k + ks < k_size)[None, :], LEFT_K)
            if SYMMETRIC:
                y = tl.trans(x)
            else:
                y = _load(y_ptr, right_inside, (k + ks < k_size)[:, None], RIGHT_K)
            acc = _dot(x, y, acc, PRECISION)
            x_ptr += left_step
            y_ptr += right_step
    return acc


@triton.jit
def _load(ptr, inside, inside_k, WHOLE_K: tl.constexpr):
    if not WHOLE_K:
        if inside is None:
            inside = inside_k
        else:
            inside = inside & inside_k
    if inside is None:
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=inside, other=0.0)
    return x


@triton.jit
def _dot(x, y, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # exact: a product of halves has 22 bits
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def cast(x, pointer):
    """float32 ``x`` rounded to what ``pointer`` points to."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def halves(x):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def draw_ticket(counter, TICKET: tl.constexpr):
    """How many programs were here before; of them, all that they have stored is seen from here on.

    First every thread's stores, then one thread's ticket. TICKET: what a maker's GPUs need beside that
    (accelerator.Accelerator.ticket).
    """
    stores_end(TICKET)
    ticket = tl.atomic_add(counter, 1, sem="acq_rel")
    if TICKET == "barrier":
        barrier()
    return ticket


@triton.jit
def stores_end(TICKET: tl.constexpr):
    """Until every thread's stores can be seen by the program's others."""
    if TICKET == "wait":
        _wait_for_stores()
    barrier()


@triton.jit
def _wait_for_stores():
    """Until what this thread has stored can be released by another one: AMD's CDNA."""
    asm: tl.constexpr = "s_waitcnt vmcnt(0)\n\ts_mov_b32 $0, $1"
    return tl.inline_asm_elementwise(asm, "=s,s,~{memory}", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sum_all(sums, slabs, x, count, BLOCK: tl.constexpr):
    """normalize's two sums, of ``slabs`` float64 numbers, and that of ``count`` others: one loop, in a fixed order."""
    offsets = tl.arange(0, BLOCK)
    on = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tl.maximum(slabs, count), BLOCK):
        at = start + offsets
        on += tl.load(sums + at, mask=at < slabs, other=0.0, cache_modifier=".cg")
        squares += tl.load(sums + slabs + at, mask=at < slabs, other=0.0, cache_modifier=".cg")
        total += tl.load(x + at, mask=at < count, other=0.0, cache_modifier=".cg")
    return tl.sum(on, 0), tl.sum(squares, 0), tl.sum(total, 0)


@triton.jit
def store_terms(on_sum, off_sum, lambd, scale, loss, on_diag, off_diag):
    """The three terms, from sums in float64. ``off_sum`` is the sum of C_ij^2 off the diagonal; NaN passes."""
    off_sum = tl.where(off_sum < 0, 0.0, off_sum)
    tl.store(loss, ((on_sum + lambd * off_sum) * scale).to(tl.float32))
    tl.store(on_diag, on_sum.to(tl.float32))
    tl.store(off_diag, off_sum.to(tl.float32))


@triton.jit
def weights_of_sums(g_loss, g_on, g_off, lambd, scale):
    """The gradients with respect to the two sums, on_diag and off_diag; None is zero."""
    w_on = 0.0
    w_off = 0.0
    if g_on is not None:
        w_on += tl.load(g_on)
    if g_off is not None:
        w_off += tl.load(g_off)
    if g_loss is not None:
        w_on += tl.load(g_loss) * scale
        w_off += tl.load(g_loss) * scale * lambd
    return w_on, w_off
