"""What a call costs on one device: FLOPs, bytes moved, peak memory, and the time below which it cannot go.

One function an implementation, each a few formulas in N, D and the sizes of a number. They count

* FLOPs of the matrix products, forward and backward, a symmetric product once;
* bytes that travel from and to memory: each time an operator reads or writes an array, unless the array is so small
  (``CACHED_BYTES``) that it stays in the caches;
* memory at its peak, beyond what every implementation holds: the inputs and both gradients.

tests/planning/test_plan.py compares them with what PyTorch's operators allocate, read and write.
"""

from __future__ import annotations

import dataclasses

import torch

from ..backends import accelerator, cuda_backend, torch_small, torch_whole
from ..backends import slabs as cpu_slabs
from ..backends.arrays import VECTOR
from ..backends.triton_kernels import configs
from ..backends.triton_kernels.shares import shares
from ..normalization import Normalization
from . import cuda
from .devices import Device

CACHED_BYTES = 2**24  # caches hold a few arrays of this size: 32 MiB and more on server CPUs, 40 to 126 MB on the GPUs


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one implementation costs each rank, forward and backward."""

    flops: int  # of the matrix products
    bytes_moved: int  # from and to the device's memory
    peak_memory: int  # bytes, less those of the inputs and of both gradients
    floor: float  # seconds: max(bytes_moved / bandwidth, flops / matrix-product rate), without communication
    # With several ranks, from network.py:
    all_to_all_bytes: int = 0  # that each rank hands to the collectives of this kind
    all_reduce_bytes: int = 0
    all_gather_bytes: int = 0
    sent_bytes: int = 0  # by each rank, in all of them
    network: float = 0.0  # seconds, one collective after the other
    step: float = 0.0  # seconds: floor and network, as far as they do not overlap
    collectives: tuple = ()  # network.Collective, in their order
    kernels: tuple = ()  # (name, seconds) of each kernel, predicted where cuda.py can tell


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss to compute: N samples over all ranks, D features, and where."""

    n: int
    d: int
    dtype: torch.dtype  # of the inputs
    device: Device
    world_size: int
    route: str

    @property
    def compute_dtype(self) -> torch.dtype:
        """What everything but half-precision matrix products is computed in."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def product_dtype(self) -> torch.dtype:
        """What this package multiplies: on CPUs halves are converted first."""
        return self.compute_dtype if self.device.type == "cpu" else self.dtype

    @property
    def local_shape(self) -> tuple[int, int]:
        """Samples and features that a rank works on: all samples of its features (Gram), or its samples (direct)."""
        if self.route == "gram":
            return self.n, -(-self.d // self.world_size)
        return self.n // self.world_size, self.d

    @property
    def flops(self) -> int:
        """Of the route's matrix products on each rank: 6 N^2 D (Gram) or 6 N D^2 (direct), divided by the ranks."""
        return 6 * self.n * self.d * (self.n if self.route == "gram" else self.d) // self.world_size

    @property
    def lower_bound(self) -> float:
        """Seconds that any implementation of the route needs: it reads the inputs twice and writes the gradients."""
        bytes_moved = 6 * (self.n // self.world_size) * self.d * self.dtype.itemsize
        return min(self.seconds(self.flops, bytes_moved, dtype) for dtype in {self.dtype, self.compute_dtype})

    def seconds(self, flops: int, bytes_moved: int, product_dtype: torch.dtype) -> float:
        """The roofline: whichever of memory and arithmetic takes longer."""
        return max(bytes_moved / self.device.bandwidth, flops / self.device.product_rate(product_dtype))


def torch_cost(p: Problem) -> Cost:
    """The torch backend: slabs on CPUs and, over several ranks, everywhere; else whole matrices, as of small inputs."""
    if p.device.type != "cpu" and p.world_size == 1:
        return _whole_cost(p)
    return _small_cost(p) if p.world_size == 1 and torch_small.keeps(p.n, p.d, p.dtype) else _slabs_cost(p)


def _small_cost(p: Problem) -> Cost:
    """Small inputs on CPUs keep both views, centred, and make arrays of that size of them (torch_small.py)."""
    n, d = p.n, p.d
    size, in_size = p.compute_dtype.itemsize, p.dtype.itemsize
    views, gradients = 2 * n * d * size, 2 * n * d * in_size
    of_half = views // 2 if in_size < size else 0  # a view's gradient before it is rounded
    if p.route == "gram":
        product = 2 * n * n * size
        forward = max(views + product, product * 3 // 2)  # squares and K; K_a * K_b
        backward = product + views + max(product - gradients, views - gradients, of_half)  # K exchanged; A_hat * P; ...
        passes = 8  # over K: made, its diagonal, K_a * K_b, exchanged, multiplied
    else:
        product = d * d * size
        forward = max(views, 2 * product)  # squares; C and its squares
        backward = 3 * product + of_half  # C, G, and G with a view's rstd
        passes = 20
    peak = 20 * d * size + views + max(forward - gradients, backward)
    bytes_moved = _traffic(gradients, 8, at_least=6) + _traffic(views, 30) + _traffic(product, passes)
    return _cost(p, p.flops, bytes_moved, peak, p.product_dtype)


def _whole_cost(p: Problem) -> Cost:
    """On accelerators it keeps A_hat, B_hat and the product, and makes temporaries by the chunk (torch_whole.py).

    Passes over N x D numbers. In the inputs' dtype: normalize reads 4 and writes 2, gram and correlate read 2,
    input_grad reads 4, and where features are rounded 4 more, and writes 2. In float32, where features are rounded:
    normalize 10 and input_grad 18; where they are not, normalize reads and writes A_hat and B_hat 6 and 4 times more,
    and input_grad P and its product 16 times.
    """
    n, d, size = p.n, p.d, p.compute_dtype.itemsize
    dtype = configs.compute_dtype(n, d, p.dtype, normalized=True)
    rounded, grads_rounded = dtype.itemsize < size, p.dtype.itemsize < size
    pitch = torch_whole._empty_hats(torch.empty(n, d, dtype=p.dtype, device="meta"), Normalization()).shape[2]
    hats = 2 * n * pitch * dtype.itemsize
    temporaries = (2 if rounded or grads_rounded else 1) * n * _first_chunk(n, d, p.compute_dtype, rounded) * size
    if p.route == "gram":
        wide = 8 if n <= torch_whole.WIDE_ROWS else size
        product, k = 2 * n * n * dtype.itemsize, 2 * n * n * wide
        slices = torch_whole._slices(n, d, torch.device("meta"))
        parts = min(2 * slices * n * n * size, max(torch_whole.CHUNK_BYTES, n * n * size))
        forward = k + max(parts if slices > 1 else 0, n * n * wide, product)
        product_traffic = _traffic(k, 8) + _traffic(product, 2) + _traffic(2 * slices * n * n * size, 2)
    else:
        product = d * d * dtype.itemsize
        forward = 2 * d * d * size + (product if rounded else 0)
        product_traffic = _traffic(d * d * size, 6) + _traffic(product, 3)
    gradients = 2 * n * d * p.dtype.itemsize  # taken off, and do not exist yet in the forward pass
    peak = hats + 14 * d * size + max(max(temporaries, forward) - gradients, product + temporaries + 22 * d * size)
    passes = 18 if rounded else 14
    floats = 28 if rounded else 26
    bytes_moved = _traffic(n * d * p.dtype.itemsize, passes, at_least=6) + _traffic(n * d * size, floats)
    return _cost(p, p.flops, bytes_moved + product_traffic, peak, p.dtype)


def _first_chunk(n: int, d: int, dtype: torch.dtype, rounded: bool) -> int:
    """Columns that the torch backend's temporaries have on accelerators."""
    chunk = next(torch_whole._chunks(n, d, dtype, arrays=2 if rounded else 1))
    return chunk.stop - chunk.start


def _slabs_cost(p: Problem) -> Cost:
    """On CPUs and over several ranks it keeps the product, and a few slabs or centred views that are small."""
    n, d = p.local_shape
    size, in_size = p.compute_dtype.itemsize, p.dtype.itemsize
    of_columns, of_rows = _slab_bytes(d, n, size), _slab_bytes(n, d, size)  # a slab of both views
    if p.device.type != "cpu":  # a part of a batch (torch_partial.py)
        of_columns = min(2 * n * d * size, torch_whole.CHUNK_BYTES)
    if p.route == "gram":
        product = 2 * n * n * size
        slabs = -(-2 * n * d * size // of_columns)
        # A slab and room for three views' squares, beside K's lower triangles; or those and K; or K_a * K_b, and the
        # same in float64 to be summed.
        squares = _slab_bytes(d, n, size, cpu_slabs.NARROW_SLAB) * 3 // 2
        forward = max(of_columns + squares + product * 5 // 8, product * 13 // 8, product + n * n * (size + 8))
        # A slab, one view's P (which becomes the gradient where there is one slab) and A_hat * P
        backward = product + of_columns + of_columns // (2 if slabs == 1 and in_size == size else 1)
        # Passes over K_a and K_b: divided, mirrored, multiplied and summed in float64, 8; each slab adds to
        # their lower triangles, and in the backward pass reads them.
        product_passes = 8 + 2 * slabs
    elif p.world_size > 1:
        product = d * d * size
        slabs = -(-2 * n * d * size // of_rows)
        forward = max(2 * of_columns, product + of_rows + product)  # C and a slab's product
        backward = product + max(product, 2 * of_rows)  # C^2; or a slab, one view's P, and A_hat * P
        # Passes over C: squared and summed, again twice for the gradient's means, 12; each slab's product is written,
        # read and added to C, and in the backward pass reads C for each view.
        product_passes = 12 + 6 * slabs
    else:
        product = d * d * size
        slabs = -(-2 * n * d * size // of_rows)
        # C, its square or a slab's product; a slab, and three views' products of a part of it
        squares = _slab_bytes(n, d, size, cpu_slabs.NARROW_SLAB) * 3 // 2
        forward = product + of_rows + max(product, squares)
        # C and G; a slab, and one view's P where it is not multiplied into the gradient
        backward = 2 * product + of_rows + (of_rows // 2 if size == 4 else 0)
        # Passes over C: scaled 4, squared and summed 6, G made of it 4; each slab's product is written, read and added
        # to C, and in the backward pass reads G for each view.
        product_passes = 14 + 6 * slabs
    if p.device.type != "cpu" and in_size < size:
        backward += product * in_size // size  # half-precision products copy their operands
    # The inputs' gradients, which are taken off, exist in the backward pass only.
    peak = 20 * d * size + max(forward - 2 * n * d * in_size, backward)  # 20: statistics and factors of each feature
    if p.world_size > 1 and p.route == "gram":  # the shards of two views, and of their gradients
        peak += 4 * n * d * in_size
    # The means read 2 N D, gram or correlate 2 N D, input_grad reads 2 N D and writes 2 N D.
    bytes_moved = _traffic(n * d * in_size, 8, at_least=6) + _traffic(product, product_passes)
    return _cost(p, p.flops, bytes_moved, peak, p.product_dtype)


def triton_cost(p: Problem) -> Cost:
    """The Triton backend keeps A_hat and B_hat, and K or C, in the dtype that it multiplies (triton_backend.py).

    Passes over N x D numbers (of one view 1, of both 2): normalize reads 2, or 4 in its two phases, and writes 2; gram
    and correlate read 2; input_grad writes 2 and reads what it standardises, and in half precision also the rounded
    operands (Gram 4 and 2, direct 4 and 2). Where N is several row tiles, the Gram route's product reads 2 and writes
    2, and what is elementwise reads 4 and writes 2.
    """
    n, d = p.local_shape
    in_size = p.dtype.itemsize
    dtype = configs.compute_dtype(n, d, p.dtype, normalized=True)
    size, raw = dtype.itemsize, dtype != torch.float32
    chip = configs.chip_of(p.device.about)

    def pitch(columns: int) -> int:  # of padded rows
        return configs.cdiv(columns * size, configs.ROW_BYTES) * configs.ROW_BYTES // size

    gradients = 2 * n * d * in_size  # do not exist yet in the forward pass, and are taken off
    stats = configs.stats_rows(normalized=True, raw=raw) * d * 4
    passes = (4 if n <= max(slab.rows for slab in configs.NORMALIZE) else 6) + 2 + (8 if raw else 6)
    row_sums = 0
    if p.route == "gram":
        blocks = chip.gram(n, dtype)
        product = 2 * n * pitch(n) * size
        items = sum(part.items for part in shares(chip, n, d, in_size, blocks))
        partials = items * blocks.m**2 * 4  # float32 tiles, a slice of D each
        blocks = chip.gram_grad(n, d, dtype, normalized=True)
        slabs, row_tiles = configs.cdiv(d, blocks.n), configs.cdiv(n, blocks.m)
        waves = -(-2 * slabs // chip.multiprocessors)  # of slabs, which read K together
        product_traffic = _traffic(product, 1 + waves)
        if row_tiles > 1:
            passes += 10 - (8 if raw else 6)
            row_sums = 2 * row_tiles * min(slabs, configs.cdiv(configs.grad_columns(n), blocks.n)) * blocks.n * 4
    else:
        tiles = configs.cdiv(d, chip.correlate(d, dtype).m)
        product = d * pitch(d) * size
        partials = 2 * tiles * d * 4 + tiles**2 * 8  # sums over the tiles' rows and columns
        product_traffic = _traffic(product, 3)  # written, and read for each view
    bytes_moved = _traffic(n * d * in_size, passes, at_least=6) + product_traffic + _traffic(partials, 2)
    peak = 2 * n * pitch(d) * size + product + stats + max(0, partials - gradients, row_sums)
    if p.world_size > 1 and p.route == "gram":  # the shards of two views and of their gradients; A_hat, B_hat once more
        peak += 4 * n * d * in_size + 2 * n * d * size
    return _cost(p, p.flops, bytes_moved, peak, p.dtype)


def cuda_cost(p: Problem) -> Cost:
    """The CUDA backend keeps what Triton's does (cuda_backend.py), with rows that begin at multiples of 16 bytes.

    Passes over N x D numbers: normalize reads 2, or 4 where chunks of rows go through memory, and writes 2; gram and
    correlate read 2; input_grad writes 2 and reads what it standardises, and in half precision also the rounded
    operands (Gram 4 and 2, direct 4 and 2). Where a block walks over several row tiles of the Gram route, it reads what
    it standardises and what it has stored once more, and stores that again. On H100 and H200 also what the kernels
    should take in half precision.
    """
    n, d = p.local_shape
    in_size, about, gpu = p.dtype.itemsize, p.device.about, p.device.known
    dtype = configs.compute_dtype(n, d, p.dtype, normalized=True)
    size, raw, tf32 = dtype.itemsize, dtype != torch.float32, accelerator.tf32()
    hopper = about.architecture == "sm_90"

    def pitch(columns: int) -> int:  # of padded rows
        return configs.cdiv(columns * size, VECTOR) * VECTOR // size

    stats = cuda_backend.STATS_ROWS * d * 4
    in_one = cuda.CLUSTER_ROWS if hopper else about.shared_memory // 64  # rows that normalize holds on chip
    passes = (4 if n <= in_one else 6) + 2 + (8 if raw else 6)
    if p.route == "gram":
        product = 2 * n * pitch(n) * size
        partials = cuda.gram_workspace(n, d, size, tf32, about)
        if hopper and raw:
            rounds, parts = cuda.gram_grad_tiles(n, d)
        else:
            rounds = -(-2 * -(-d // 64) // about.units)
            parts = 2 if n > (256 if raw or tf32 else 128) else 1
        product_traffic = _traffic(product, 1 + rounds)
        passes += 6 if parts > 1 else 0
    else:
        large = configs.cdiv(d, 128) ** 2 >= about.units and (raw or tf32)
        tiles = configs.cdiv(d, 128 if large else 64)
        product = d * pitch(d) * size
        partials = 2 * tiles * d * 4 + tiles**2 * 8  # sums over the tiles' rows and columns
        product_traffic = _traffic(product, 3)  # written, and read for each view
    bytes_moved = _traffic(n * d * in_size, passes, at_least=6) + product_traffic + _traffic(partials, 2)
    gradients = 2 * n * d * in_size  # do not exist yet in the forward pass, and are taken off
    peak = 2 * n * pitch(d) * size + product + stats + max(0, partials - gradients)
    if p.world_size > 1 and p.route == "gram":  # the shards of two views and of their gradients; A_hat, B_hat once more
        peak += 4 * n * d * in_size + 2 * n * d * size
    cost = _cost(p, p.flops, bytes_moved, peak, p.dtype)
    if gpu is None or gpu.architecture != "sm_90" or p.world_size > 1 or p.dtype.itemsize != 2:
        return cost
    times = cuda.predict(p.n, p.d, p.route, gpu)
    names = ("normalize", "gram", "gram_grad") if p.route == "gram" else ("normalize", "correlate", "direct_grad")
    return dataclasses.replace(cost, kernels=tuple(zip(names, times, strict=True)))


def reference_cost(p: Problem) -> Cost:
    """reference.py: C by plain PyTorch, its gradient by autograd, everything in at least float32.

    Passes over D x D arrays: C written 1, / N 2, diag_embed 1, subtract 3, square 2, sum 1; backward: square 2 + 2 + 2,
    negate 2, diagonal 1, add 3, / N 2, two products 2. Together 26; over N x D arrays 72, and 6 to convert halves.
    """
    n, d, size = p.n // p.world_size, p.d, p.compute_dtype.itemsize
    converted = p.dtype.itemsize < size
    bytes_moved = _traffic(d * d * size, 26) + _traffic(n * d * size, 78 if converted else 72, at_least=6)
    peak = max(4 * d * d + 2 * n * d, 6 * n * d) * size
    if converted:  # the inputs' copies, and gradients that are half as large
        peak += 2 * n * d * size + 2 * n * d * (size - p.dtype.itemsize)
    return _cost(p, 6 * n * d * d, bytes_moved, peak, p.compute_dtype)


def usual_cost(p: Problem) -> Cost:
    """The usual implementation: the official code's recipe (facebookresearch/barlowtwins, main.py), in one dtype.

        c = batch_norm(z_a).T @ batch_norm(z_b);  c.div_(n);  all_reduce(c)
        on_diag = diagonal(c).add_(-1).pow_(2).sum();  off_diag = off_diagonal(c).pow_(2).sum()

    Each operator reads its operands and writes its results once. Passes over D x D arrays, 32:
    forward: product 1, div_ 2, off_diagonal's copy 2, pow_ 4 (it first saves what it overwrites), sum 1;
    backward: pow 2 + 2 + 2, the two slices of off_diagonal 4, zeros for the diagonal 1, add 3, the two in-place edits
    of the diagonal 2 + 2, div 2, two products 2. Over N x D arrays, 16: batch norm 4 and 6, products 2 and 4.

    Its peak is in pow's backward: what it saved and three arrays of that size, beside both standardised views; where D
    is small, in the product's backward: C's gradient, both standardised views and both of their gradients. The inputs'
    gradients, which are taken off, do not exist yet.
    """
    n, d, size = p.n // p.world_size, p.d, p.dtype.itemsize
    bytes_moved = _traffic(d * d * size, 32) + _traffic(n * d * size, 16, at_least=6)
    peak = (max(4 * d * d + 2 * n * d, d * d + 4 * n * d) - 2 * n * d) * size
    return _cost(p, 6 * n * d * d, bytes_moved, peak, p.dtype)


# Of each backend
COSTS = {"torch": torch_cost, "triton": triton_cost, "cuda": cuda_cost, "reference": reference_cost}


def _slab_bytes(length: int, other: int, size: int, least: int = cpu_slabs.MIN_SLAB) -> int:
    """Bytes of a slab of both views in the compute dtype, as the torch backend cuts them."""
    return 2 * other * len(range(length)[next(cpu_slabs._slabs(length, other, least))]) * size


def _cost(p: Problem, flops: int, bytes_moved: int, peak_memory: int, product_dtype: torch.dtype) -> Cost:
    return Cost(flops, bytes_moved, peak_memory, p.seconds(flops, bytes_moved, product_dtype))


def _traffic(array_bytes: int, passes: int, at_least: int = 0) -> int:
    """Bytes that ``passes`` over an array move; of one that stays in the caches, the passes that nothing can avoid."""
    return array_bytes * (passes if array_bytes > CACHED_BYTES else at_least)
