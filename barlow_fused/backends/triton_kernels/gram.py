"""gram: K_a = A_hat A_hat^T, K_b = B_hat B_hat^T, their inner product, and the terms of the loss. One launch.

    reads   A_hat, B_hat [N, D]; the sums of ``normalize``
    writes  K_a / D - shift (I - 1 1^T / N) and K_b / D alike, [2, N, N] in the compute dtype, any
            numbers up to the end of each padded row (only for a gradient)
            loss, on_diag, off_diag, float32
    FLOPs   2 N^2 D: both products, each on its lower triangle
    bytes   each of T = ceil(N / BLOCK) tile rows of A_hat is read about T times, from L2 where slices march together;
            the partial tiles, 4 N^2 bytes for each slice of D, are written and read once

The ideas:

* **One work item is (tile of the lower triangle, view, slice of D).** It writes its float32 partial tile and is done;
  the item of a tile that arrives last adds the tile's partials in the order of the slices, multiplies K_a and K_b
  elementwise, and writes both triangles. Integer tickets decide who does the work, never the order of additions, so
  the bits do not depend on who was last. Slices fill the chip where tiles do not (N = 256: 10 tiles, 132 SMs), and
  cut the tail of the last wave where they do (N = 2048: 136 tiles); shares.py says how. No item holds two
  accumulators, so the tile is as large as a plain product's. The workspace takes the place of the input gradients,
  which do not exist yet.
* **The bulk is taken out.** Standardised features in many dimensions give K / D close to I - 1 1^T / N, and K_b A_hat
  / D close to A_hat, a part that the batch norm's backward removes again. Rounded to bfloat16 it would leave 2^-9 of
  itself behind. K / D - I + 1 1^T / N is stored instead, and ``input_grad`` adds A_hat in float32; 1^T A_hat is 0.

A persistent grid was left out: Triton does not overlap a tile's epilogue with the next one's loads, which another
program on the same multiprocessor does, and shares.py balances the load.
"""

# ruff: noqa: ANN001, ANN201, D103, N803, SIM108 - the language of Triton kernels is not quite Python

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import cast, draw_ticket, halves, matmul, store_terms, stores_end, sum_all

_COUNTS = ["N", "tiles", "first_tiles", "first_split", "first_steps", "rest_split", "rest_steps", "slabs"]


@triton.jit(do_not_specialize=_COUNTS)
def gram_kernel(
    a, b, a_n, a_d, b_n, b_d,  # A_hat, B_hat and strides; with TMA a is a descriptor of [BLOCK, BLOCK_K]
    # blocks of both, [2 N, D]
    partials,  # [items, BLOCK, BLOCK] float32: of the first tiles, then of the others, [split, 2, tiles] each
    k_out, k_pitch,  # [2, N, N], rows that begin k_pitch numbers apart; or None
    inner,  # [tiles] float64
    sums,  # [2, slabs] float64
    counters,  # [tiles + 1] int32, zero before and after
    loss, on_diag, off_diag,
    N, D, tiles,
    first_tiles, first_split, first_steps,  # the first tiles' slices, each of steps * BLOCK_K columns
    rest_split, rest_steps,  # and the others'
    slabs, lambd, scale,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE_K: tl.constexpr, TMA: tl.constexpr, UNIT_STRIDE: tl.constexpr, PRECISION: tl.constexpr,
    TICKET: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr,  # of partial tiles, that are loaded at a time
    ONE_TILE: tl.constexpr,  # N <= BLOCK
    BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first_items = 2 * first_tiles * first_split
    is_first = pid < first_items
    begin_items = tl.where(is_first, 0, first_items)  # of the items with as many slices as this one has
    count = tl.where(is_first, first_tiles, tiles - first_tiles)
    split = tl.where(is_first, first_split, rest_split)
    steps = tl.where(is_first, first_steps, rest_steps)
    local = pid - begin_items
    of_tile = local % count  # tiles run fastest: programs that run together read the same columns
    tile = of_tile + tl.where(is_first, 0, first_tiles)
    view = (local // count) % 2
    part = local // (2 * count)
    tile_m, tile_n = lower_triangle_tile(tile)
    begin = part * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, D)
    row = tile_m * BLOCK
    column = tile_n * BLOCK
    i = tl.arange(0, BLOCK)
    out = partials + pid.to(tl.int64) * BLOCK * BLOCK
    if CHUNK == 0:
        acc = _product(
            a, b, a_n, a_d, b_n, b_d, view, row, column, begin, end, N, D,
            BLOCK, BLOCK_K, WHOLE_K, TMA, UNIT_STRIDE, PRECISION, ONE_TILE,
        )  # fmt: skip
        tl.store(out + i[:, None] * BLOCK + i[None, :], acc)
    else:  # blocks.matmul says why; a second accumulator waits in memory
        for chunk in range(begin, end, CHUNK):
            acc = _product(
                a, b, a_n, a_d, b_n, b_d, view, row, column, chunk, tl.minimum(chunk + CHUNK, end), N, D,
                BLOCK, BLOCK_K, WHOLE_K, TMA, UNIT_STRIDE, PRECISION, ONE_TILE,
            )  # fmt: skip
            left, right = halves(acc)
            _add(out, left, chunk > begin, 0, TICKET)
            _add(out, right, chunk > begin, BLOCK // 2, TICKET)

    if draw_ticket(counters + tile, TICKET) == 2 * split - 1:  # the tile's last item to arrive
        tl.store(counters + tile, 0)
        tile_sum = tl.zeros([ROWS], tl.float64)
        view_stride = count.to(tl.int64) * BLOCK * BLOCK
        first_item = (begin_items + of_tile).to(tl.int64)
        for start in range(0, BLOCK, ROWS):
            r = start + tl.arange(0, ROWS)
            tile_ptr = partials + first_item * BLOCK * BLOCK + r[:, None] * BLOCK + i[None, :]
            k_a = tl.zeros([ROWS, BLOCK], tl.float32)
            k_b = tl.zeros([ROWS, BLOCK], tl.float32)
            # The rest is above the diagonal.
            wanted = (row + r < N)[:, None] & (column + i < row + start + ROWS)[None, :]
            for first in range(0, split, SLICES):
                for offset in tl.static_range(SLICES):  # all loads, in one round, and then the sums, in their order
                    there = (first + offset < split) & wanted
                    k_a += tl.load(tile_ptr, mask=there, other=0.0, cache_modifier=".cg")
                    k_b += tl.load(tile_ptr + view_stride, mask=there, other=0.0, cache_modifier=".cg")
                    tile_ptr += 2 * view_stride
            rows = (row + r)[:, None]
            columns = (column + i)[None, :]
            lower = (rows >= columns) & (rows < N)
            twice = tl.where(rows > columns, 2.0, 1.0)  # for the triangle that is not computed
            tile_sum += tl.sum(tl.where(lower, k_a.to(tl.float64) * k_b.to(tl.float64) * twice, 0.0), 1)
            if k_out is not None:
                shift = SHIFT * 1.0 * (tl.where(rows == columns, 1.0, 0.0) - 1.0 / N)
                k_a = cast(k_a / D - shift, k_out)
                k_b = cast(k_b / D - shift, k_out)
                above = (rows > columns) & (rows < k_pitch) & (columns < N)  # beyond N what gram_grad multiplies by 0
                rows = rows.to(tl.int64)
                columns = columns.to(tl.int64)
                k_b_out = k_out + tl.cast(N, tl.int64) * k_pitch
                tl.store(k_out + rows * k_pitch + columns, k_a, mask=lower)
                tl.store(k_b_out + rows * k_pitch + columns, k_b, mask=lower)
                tl.store(k_out + columns * k_pitch + rows, k_a, mask=above)
                tl.store(k_b_out + columns * k_pitch + rows, k_b, mask=above)
        tl.store(inner + tile, tl.sum(tile_sum, 0))

        if draw_ticket(counters + tiles, TICKET) == tiles - 1:  # the last tile
            tl.store(counters + tiles, 0)
            on_sum, squares, product = sum_all(sums, slabs, inner, tiles, BLOCK_SUM)
            n = tl.cast(N, tl.float64)
            store_terms(on_sum, product / (n * n) - squares, lambd, scale, loss, on_diag, off_diag)


@triton.jit
def _product(
    a, b, a_n, a_d, b_n, b_d, view, row, column, begin, end, N, D,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, TMA: tl.constexpr, UNIT_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """A tile of one view's K, summed over a part of D."""
    if TMA:
        acc = matmul(
            a, 0, 0, view * N + row, 2 * N, a, 0, 0, 0, view * N + column, 2 * N, begin, end, D,
            BLOCK, BLOCK, BLOCK_K, 0, False, WHOLE_K, WHOLE_K, True, False, True, PRECISION, ONE_TILE,
        )  # fmt: skip
    else:
        x = tl.where(view == 0, a, b)
        x_n = tl.where(view == 0, a_n, b_n)
        if UNIT_STRIDE:  # known to the compiler, which then loads 16 bytes at once
            x_d = 1
        else:
            x_d = tl.where(view == 0, a_d, b_d)
        acc = matmul(
            x, x_n, x_d, row, N, x, x_d, x_n, 0, column, N, begin, end, D,
            BLOCK, BLOCK, BLOCK_K, 0, False, WHOLE_K, WHOLE_K, False, False, True, PRECISION, ONE_TILE,
        )  # fmt: skip
    return acc


@triton.jit
def _add(out, x, again, column, TICKET: tl.constexpr):
    """Add one half of a tile to what this program has stored of it, or store it."""
    rows = tl.arange(0, x.shape[0])
    ptr = out + rows[:, None] * x.shape[0] + (column + tl.arange(0, x.shape[1]))[None, :]
    stores_end(TICKET)  # other threads may have stored it
    if again:
        x += tl.load(ptr, cache_modifier=".cg")
    tl.store(ptr, x)


@triton.jit
def lower_triangle_tile(tile):
    """(row, column) of the tile-th tile of a lower triangle, counted row by row."""
    m = ((tl.sqrt((8 * tile + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    m = tl.where(m * (m + 1) // 2 > tile, m - 1, m)  # the square root is rounded
    m = tl.where((m + 1) * (m + 2) // 2 <= tile, m + 1, m)
    return m, tile - m * (m + 1) // 2
