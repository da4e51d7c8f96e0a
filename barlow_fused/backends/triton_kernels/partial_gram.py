"""partial_gram: one view's K = X_hat X_hat^T, lower triangle, summed over the features that a rank has. One launch.

    reads   X_hat [N, D], zeros up to the end of each padded row
    writes  [split, size] float32: a slice's sums, in panels as torch_partial.panels has them, ready to be sent
    FLOPs   N^2 D

``gram`` cannot be used: it wants both views at once, where one should be multiplied while the other travels, and it
divides, shifts and rounds K, which must first be summed over the ranks. What is left is the product.
"""

# ruff: noqa: ANN001, ANN201, N803 - the language of Triton kernels is not quite Python

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import matmul


@triton.jit(do_not_specialize=["N", "size", "steps"])
def partial_gram_kernel(
    x, pitch, partials, N, D, size, steps,  # a slice is steps * BLOCK_K columns
    PANEL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: a tile of a panel, and a slice of D. BLOCK divides PANEL, a panel's rows."""
    row = tl.program_id(0) * BLOCK
    column = tl.program_id(1) * BLOCK
    panel = row // PANEL
    stop = tl.minimum((panel + 1) * PANEL, N)  # the panel's last row, and its width
    if column < stop:
        part = tl.program_id(2)
        begin = part * steps * BLOCK_K
        acc = matmul(
            x, pitch, 1, row, N, x, 1, pitch, 0, column, N, begin, tl.minimum(begin + steps * BLOCK_K, D), D,
            BLOCK, BLOCK, BLOCK_K, CHUNK, False, True, True, False, False, True, PRECISION,
        )  # fmt: skip
        rows = row + tl.arange(0, BLOCK)
        columns = column + tl.arange(0, BLOCK)
        before = tl.cast(panel, tl.int64) * (panel + 1) // 2 * PANEL * PANEL  # elements of the panels above
        offsets = (rows - panel * PANEL).to(tl.int64)[:, None] * stop + columns[None, :]
        out = partials + tl.cast(part, tl.int64) * size + before + offsets
        tl.store(out, acc, mask=(rows < stop)[:, None] & (columns < stop)[None, :])
