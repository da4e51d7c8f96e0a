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
EPILOGUES = {"gram_grad": 3150, "gram_grad, two walks": 4300, "correlate": 4000, "direct_grad": 2500}  # instructions


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
        rounds, parts = gram_grad_tiles(n, d)
        tile = _cdiv(n, 64) * step + _epilogue("gram_grad, two walks" if parts > 1 else "gram_grad")
        return Times(normalize, product, rounds * parts * tile + LAUNCH)
    squares = _cdiv(d, 256) ** 2
    product = _cdiv(squares, CLUSTERS[2]) * (_cdiv(n, 64) * step + _epilogue("correlate")) + LAUNCH
    tiles = _cdiv(n, 256) * _cdiv(d, 256)
    gradient = 2 * (_cdiv(tiles, CLUSTERS[2]) * (_cdiv(d, 64) * step + _epilogue("direct_grad")) + LAUNCH)
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
    rows, slabs = _cdiv(n, 128), 2 * _cdiv(d, 256)
    options = []
    for cluster, at_once in CLUSTERS.items():
        rounds, parts = _cdiv(slabs, at_once), _cdiv(rows, cluster)
        options.append((rounds * parts * (_cdiv(n, 64) + (10 if parts > 1 else 7)), rounds, parts))
    return min(options, key=lambda option: option[0])[1:]


def _epilogue(kernel: str) -> float:
    return 8 * EPILOGUES[kernel] / ISSUE_RATE + EPILOGUE_WAIT


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
