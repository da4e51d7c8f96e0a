"""How long the CUDA kernels should take on H100 and H200, in half precision: predictions, to be held against a GPU.

What they assume:

* A step, 128 x 256 x 64 products a multiprocessor, takes as long as a large matrix product takes for as many FLOPs
  (``devices.KNOWN``, measured): 0.70 us. A step of 128 x 128 x 64 has half of them and takes 0.625 of that, since
  shared memory then is what limits it; on the diagonal, where rows come once, 0.5, and 128 x 64 there 0.375
  (csrc/blocks/hopper_multiply.h counts).
* gram of few rows is not faster than memory hands out A_hat and B_hat, though small ones are in L2.
* The chip holds 15 clusters of 8 blocks, 33 of 4, 66 of 2. Steps are counted as the kernels cut them; the tests compare
  ``gram_steps`` and ``gram_grad_tiles`` with the kernels' plans.
* An epilogue takes as long as its instructions, of 8 warps, 4 a cycle and multiprocessor at 1.75 GHz, and 1 us for what
  it waits for; products do not overlap it. ``python -m benchmarks.kernels --cuda`` counts the instructions.
* The input gradients' consumers only add up and hand over, and wait for 0.5 us, since what they need next is under
  way. Three warps of finishers then make the gradient beside the next product, 43 rows each, and eleven warps that of
  the last tile, 12 rows each: a warp issues an instruction every other cycle, and a read takes 0.8 us, as many rows
  ahead as a thread holds. Whichever takes longer counts.
* L2 hands out no more than it does for that large product, whose clusters of two read 32 KiB a step and multiprocessor.
* normalize reads and writes memory at 85 % of a copy's rate.
* Handing over a square of K and adding it up takes 7 us: 640 KiB of partial tiles through one multiprocessor. Where
  tiles are shared out in eight it takes 2 us a tile and 2 more for the last.
* A kernel takes 3 us to begin and to end, as in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

from ..backends.accelerator import Accelerator
from .devices import KnownGpu

MULTIPROCESSORS = 132
CLUSTERS = {8: 15, 4: 33, 2: 66}
CLUSTER_ROWS = 13_000  # that normalize's clusters hold
LAUNCH = 3e-6
COPY_SHARE = 0.85
NARROW_ROWS, MANY_ROWS = 64, 256  # up to which gram has one tile half as wide; beyond which clusters share squares
STEP_FLOPS = 2 * 128 * 256 * 64
NARROW_STEP, DIAGONAL_STEP, SMALL_STEP = 0.375, 0.5, 0.625
ISSUE_RATE = 4 * 1.75e9  # instructions of warps a second
EPILOGUE_WAIT = 1e-6
EPILOGUES = {"gram_grad": 940, "correlate": 4000, "direct_grad": 340}  # instructions of the consumers
HAND_OVER_WAIT = 0.5e-6
ROWS, LAST_ROWS = 43, 12  # of a tile, a finishers' warp; where the consumers help
READ = 0.8e-6  # of a row, from L2 or memory
STEP_READS = 32 * 132  # KiB that L2 hands out in the time of a step
# Of finishers: instructions of a row, and rows read ahead
WALKS = {"gram_grad": (96, 8), "first": (104, 4), "second": (72, 4), "direct_grad": (99, 6)}


class Times(NamedTuple):
    """Seconds of each kernel, forward and backward."""

    normalize: float
    product: float  # gram or correlate
    gradient: float  # gram_grad, or direct_grad for both views

    @property
    def total(self) -> float:
        """Of all of them."""
        return sum(self)


def predict(n: int, d: int, route: str, gpu: KnownGpu) -> Times:
    """The kernels' times for inputs (n, d) in half precision, on a Hopper GPU of the table of rates."""
    step = STEP_FLOPS * MULTIPROCESSORS / gpu.products["half"]
    reads = 2 if n <= CLUSTER_ROWS else 4
    normalize = (reads + 2) * n * d * 2 / (COPY_SHARE * gpu.bandwidth) + LAUNCH
    if route == "gram":
        product = gram_seconds(n, d, gpu, *gram_steps(n, d)) + LAUNCH
        cluster, rounds, parts = _gram_grad_clusters(n, d)
        return Times(normalize, product, _gram_grad(n, cluster, rounds, parts, step) + LAUNCH)
    squares = _cdiv(d, 256) ** 2
    product = _cdiv(squares, CLUSTERS[2]) * (_cdiv(n, 64) * step + _epilogue("correlate")) + LAUNCH
    tiles = _cdiv(n, 256) * _cdiv(d, 256)
    multiply = _cdiv(d, 64) * step + _epilogue("direct_grad", HAND_OVER_WAIT)
    reads = (32 * _cdiv(d, 64) + 128) / 32 * step
    gradient = _cdiv(tiles, CLUSTERS[2]) * max(multiply, _walk("direct_grad"), reads)
    gradient = 2 * (gradient + _walk("direct_grad", LAST_ROWS) + LAUNCH)
    return Times(normalize, product, gradient)


def gram_seconds(n: int, d: int, gpu: KnownGpu, steps: int, works: int) -> float:
    """gram without its launch, if its busiest multiprocessor takes so many steps and hands over so many tiles."""
    product = steps * STEP_FLOPS * MULTIPROCESSORS / gpu.products["half"]
    if n > MANY_ROWS:
        return product + 7e-6
    if n > 128:  # each third tile that a multiprocessor takes is not on the diagonal
        product *= DIAGONAL_STEP + (SMALL_STEP - DIAGONAL_STEP) * _cdiv(works, 3) / works
    else:
        product *= NARROW_STEP if n <= NARROW_ROWS else DIAGONAL_STEP
    return max(product, 4 * n * d / (COPY_SHARE * gpu.bandwidth)) + (works + 1) * 2e-6


def least_gram_steps(n: int, d: int) -> int:
    """What the busiest multiprocessor would take if all had equal shares of the steps that whole tiles need."""
    rows, blocks = (_cdiv(n, 256), 2) if n > MANY_ROWS else (_cdiv(n, 128), 1)
    return _cdiv(rows * (rows + 1) * blocks * _cdiv(d, 64), MULTIPROCESSORS)  # both views


def gram_steps(n: int, d: int) -> tuple[int, int]:
    """Steps of gram's busiest multiprocessor, and tiles that it hands over one after the other (csrc/kernels/gram.cu).

    Steps are of 128 x 256 beyond MANY_ROWS, else of 128 x 128, or 128 x 64.
    """
    steps = _cdiv(d, 64)
    if n > MANY_ROWS:
        rows = _cdiv(n, 256)
        total = rows * (rows + 1) * steps
        return max(min(8, total), _cdiv(total, CLUSTERS[2])), 1
    tiles = _triangle(n, 128)
    split = _slices(steps, tiles, CLUSTERS[8], _few_rows_slice(n), n * d * 2, blocks=8)
    waves = _cdiv(2 * tiles * split, CLUSTERS[8])
    return waves * _cdiv(_cdiv(steps, split), 8), waves


def gram_workspace(n: int, d: int, itemsize: int, tf32: bool, about: Accelerator) -> int:
    """Bytes of gram's partial tiles (csrc/kernels/gram.cu), for what is multiplied."""
    if about.architecture == "sm_90" and itemsize == 2:
        steps, rows = _cdiv(d, 64), _cdiv(n, 256)
        if n > MANY_ROWS:
            total = rows * (rows + 1) * steps
            share = max(min(8, total), _cdiv(total, CLUSTERS[2]))
            return (rows * (rows + 1) + _cdiv(total, share)) * 256 * 256 * 4
        split = _slices(steps, _triangle(n, 128), CLUSTERS[8], _few_rows_slice(n), n * d * 2, blocks=8)
        return _cdiv(steps, _cdiv(steps, split)) * _few_rows_slice(n)
    block = 128 if n >= 512 and (itemsize == 2 or tf32) else 64
    tiles, steps = _triangle(n, block), _cdiv(d, 128 // itemsize)
    slice_bytes = 2 * tiles * block**2 * 4
    split = _slices(steps, tiles, about.units, slice_bytes, n * d * itemsize)
    return _cdiv(steps, _cdiv(steps, split)) * slice_bytes


def _slices(steps: int, tiles: int, workers: int, slice_bytes: int, view_bytes: int, blocks: int = 1) -> int:
    """Into how many slices gram cuts D, each shared by so many blocks."""
    most = max(1, min(32, steps, 2 * view_bytes // slice_bytes))
    least = min(_cdiv(steps, 8 * 128), 32) if blocks > 1 else 1

    def time(split: int) -> int:
        waves = _cdiv(2 * tiles * split, workers)
        return blocks * waves * (_cdiv(_cdiv(steps, split), blocks) + 8) + 2 * split

    return min(range(least, max(least, most) + 1), key=time)


def _few_rows_slice(n: int) -> int:
    """Bytes of both views' partial tiles of a slice, on Hopper."""
    return 2 * _triangle(n, 128) * 128 * (64 if n <= NARROW_ROWS else 128) * 4


def _triangle(n: int, block: int) -> int:
    rows = _cdiv(n, block)
    return rows * (rows + 1) // 2


def gram_grad_tiles(n: int, d: int) -> tuple[int, int]:
    """Slabs of the busiest cluster, and row tiles of each of its blocks (csrc/kernels/hopper_gram_grad.cu)."""
    return _gram_grad_clusters(n, d)[1:]


def _gram_grad_clusters(n: int, d: int) -> tuple[int, int, int]:
    """Blocks of a cluster, and the above: as the kernel chooses, in tenths of a step."""
    rows, slabs, steps = _cdiv(n, 128), 2 * _cdiv(d, 256), _cdiv(n, 64)
    options = []
    for cluster, at_once in CLUSTERS.items():
        rounds, parts = _cdiv(slabs, at_once), _cdiv(rows, cluster)
        walk = parts > 1
        read = 10 * (steps * (16 + 32 // cluster) + (320 if walk else 192)) // 32
        tile = max(10 * steps + 22, 244 if walk else 73, read)
        time = rounds * parts * tile + (136 + 34 * parts if walk else 35)
        unequal = 100 * rounds * parts * MULTIPROCESSORS > 115 * rows * slabs
        options.append((time * (115 if unequal else 100), cluster, rounds, parts))
    return min(options, key=lambda option: option[0])[1:]


def _gram_grad(n: int, cluster: int, rounds: int, parts: int, step: float) -> float:
    """All tiles, and the last one's walks."""
    steps = _cdiv(n, 64)
    reads = 64 + 128 * (2 if parts > 1 else 1)  # KiB: A_hat; own and other, or own and what is stored
    reads = (steps * (16 + 32 / cluster) + reads) * cluster * CLUSTERS[cluster] / STEP_READS * step
    multiply = steps * step + _epilogue("gram_grad", HAND_OVER_WAIT)
    if parts == 1:
        finish = _walk("gram_grad")
        last = _walk("gram_grad", LAST_ROWS) + EPILOGUE_WAIT  # for the cluster's sums
    else:
        finish = _walk("first") + _walk("second")
        last = _walk("first") + EPILOGUE_WAIT + parts * _walk("second", LAST_ROWS)
    return multiply + (rounds * parts - 1) * max(multiply, finish, reads) + last


def _walk(kernel: str, rows: int = ROWS) -> float:
    """A warp over its rows of a tile."""
    instructions, ahead = WALKS[kernel]
    return rows * max(2 * instructions / (ISSUE_RATE / 4), READ / ahead)


def _epilogue(kernel: str, wait: float = EPILOGUE_WAIT) -> float:
    return 8 * EPILOGUES[kernel] / ISSUE_RATE + wait


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
