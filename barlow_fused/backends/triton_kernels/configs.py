"""Block shapes of the kernels, by architecture and shape.

They come from reasoning and from what the compiler says, not from measurements on a GPU. ``python -m
benchmarks.kernels`` prints registers, spills and shared memory; with Triton 3.8 for sm_90 in bfloat16:

    N, D                kernel        BLOCK_M, _N, _K    warps   stages   registers   shared memory
    256, 8192           gram           64   64   64        4       4         168          64 KiB
                        gram_grad     256   64   64        8       3         223         120 KiB
    2048, 65536         gram          128  128   64        8       3         128          96 KiB
                        grad_product  128  128   64        8       3         117          96 KiB
    8192, 2048 direct   correlate     128  128   64        8       4         184         128 KiB
                        direct_grad   128  128   64        8       4         254         128 KiB

* BLOCK_M, BLOCK_N: the larger the tile, the fewer bytes a FLOP. An accumulator takes BLOCK_M * BLOCK_N / threads of the
  255 registers that a thread has, and once more where sums are cut into chunks (blocks.py): 128 x 128 by 256 threads is
  64 + 64. The next size, 128 x 256, leaves no registers for the epilogues.
* Few tiles (small N or D) leave multiprocessors idle: 64 x 64 then, four times as many. gram takes the larger tile from
  N = 512 on, where it has 10 tiles and slices of D do the rest; the others where the larger tiles fill the chip.
* gram_grad with N <= 256 has all rows of a feature in one tile: BLOCK_M is N's power of two.
* BLOCK_K = 64 halves or 32 float32 are 128 bytes, a line of shared memory as the tensor cores and TMA want it.
* num_stages: (BLOCK_M + BLOCK_N) * BLOCK_K numbers of shared memory each, 32 KiB at 128, 128, 64 in half precision.
  sm_80 has 163 KiB a block: 3, which leaves room for the epilogue. sm_90 and sm_100 have 227 KiB: 4, of up to 7. The
  consumer chips have 99 KiB: 2.
* The Gram route's products in half precision take 3 of them and at most 128 registers on sm_90 and sm_100, so that two
  programs share a multiprocessor (``Chip.resident``): one's epilogue hides behind the other's product. Operands that
  take masks, gradients that take single numbers and a second accumulator need more registers, and have them.
* num_warps: 8 for a 128 x 128 tile, since 4 would need 128 registers for the accumulator alone.
* "tf32x3" splits every operand in two, in registers: half the tile.
* AMD's GPUs take the tiles of sm_80 with 2 stages, whose operands then fill 16 to 40 KiB of 64: half of them wait in
  registers, except on gfx950, which has 160 KiB. 256 threads are 4 warps of 64 or, on RDNA, 8 of 32. RDNA has 256
  registers a thread for everything: it always takes the smaller tiles, and has all rows in one only up to N = 128. It
  multiplies float32 outside of its matrix cores, CDNA on them.
* normalize holds BLOCK_N * BLOCK_D numbers of two views in registers: 64 a thread at most, hence fewer columns the more
  rows there are. A row of 16 columns in half precision is still a whole sector of 32 bytes.

``BARLOW_FUSED_TRITON_AUTOTUNE=1`` lets Triton measure num_stages of the products instead, once for each shape and
dtype. That takes longer than a first call without it, and cannot happen while a CUDA graph is captured. num_warps
stays: other warps add in another order, and ranks that measure apart would differ in the last bits.
tests/kernels/test_triton_compile.py compiles the table: tensor cores, no spills, shared memory within the limit.
"""

from __future__ import annotations

import dataclasses
import functools
import os

import torch

from .. import accelerator
from ..accelerator import Accelerator

MAX_REGISTERS = 255  # of a thread
REGISTERS = 65536  # of a multiprocessor
ROW_BYTES = 128  # where rows of A_hat, B_hat, K and C begin: a BLOCK_K of numbers, which no mask need cut
SLICE_COLUMNS = 512  # of a view's partial tiles, of which gram's last phase loads 16 rows at a time
SUM_BLOCK = 1024  # partial sums added at a time
CHUNK = 8192  # products a tensor core adds up before a rounded addition (blocks.py)
FLOAT32_ELEMENTS = 2**16  # of an input, up to which half precision is multiplied in float32
FLOAT32_RATIO = 1024  # D / N from which it is, too
RAW_LIMIT = 256.0  # |mu_i mu_j| s_i s_j up to which z itself is multiplied: |mean|/deviation of 16 (raw_limit below)
GRAM_MANY_ROWS = 512  # from here on gram takes the larger tiles: 10 of them and more
TMA_MIN_ELEMENTS = 2**23  # of an input: below, launches are what counts, and each descriptor costs the host 4 us
AMPERE = accelerator.named("sm_80")
INTERPRETED, INTERPRETED_UNITS = 80, 8  # Triton's interpreter takes that row of TABLE, and as many programs at once
TMA_IN_INTERPRETER = False  # for tests
GRAD_COLUMNS = 32768  # grad_columns, at least
MAX_SPLIT = 64  # slices of D, of which gram's last phase reads that many partial tiles


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a matrix product is cut."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    registers: int = MAX_REGISTERS  # of a thread, at most: so that several programs share a multiprocessor

    def options(self) -> dict[str, int]:
        """What Triton's launcher takes."""
        limit = {} if self.registers == MAX_REGISTERS else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limit

    def without_limit(self) -> Blocks:
        """The same with all registers: for operands that take masks or single numbers, which take more of them."""
        return dataclasses.replace(self, registers=MAX_REGISTERS)


@dataclasses.dataclass(frozen=True)
class Slab:
    """How many features normalize takes at a time, and how many rows at most."""

    rows: int
    columns: int
    num_warps: int


# (kernel, precision) -> for few and for many rows of tiles. Precision: "half", "tf32" or "tf32x3".
_AMPERE = {
    ("gram", "half"): (Blocks(64, 64, 64, 4, 4), Blocks(128, 128, 64, 8, 3)),
    ("gram", "tf32"): (Blocks(64, 64, 32, 4, 4), Blocks(128, 128, 32, 8, 3)),
    ("gram", "tf32x3"): (Blocks(64, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3)),
    ("correlate", "half"): (Blocks(64, 64, 64, 4, 4), Blocks(128, 128, 64, 8, 3)),
    ("correlate", "tf32"): (Blocks(64, 64, 32, 4, 4), Blocks(128, 128, 32, 8, 3)),
    ("correlate", "tf32x3"): (Blocks(64, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3)),
    ("direct_grad", "half"): (Blocks(64, 64, 64, 4, 4), Blocks(128, 128, 64, 8, 3)),
    ("direct_grad", "tf32"): (Blocks(64, 64, 32, 4, 4), Blocks(128, 128, 32, 8, 3)),
    ("direct_grad", "tf32x3"): (Blocks(64, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3)),
    ("gram_grad", "half"): (Blocks(64, 64, 64, 4, 3), Blocks(128, 128, 64, 8, 3)),
    ("gram_grad", "tf32"): (Blocks(64, 64, 32, 4, 3), Blocks(128, 64, 32, 8, 3)),
    ("gram_grad", "tf32x3"): (Blocks(64, 64, 32, 4, 3), Blocks(128, 64, 32, 8, 3)),
}


def _with_stages(table: dict, stages: dict[str, int]) -> dict:
    """The same blocks with other numbers of stages."""
    return {
        (kernel, precision): tuple(dataclasses.replace(b, num_stages=stages[precision]) for b in blocks)
        for (kernel, precision), blocks in table.items()
    }


_HOPPER = _with_stages(_AMPERE, {"half": 4, "tf32": 4, "tf32x3": 3}) | {  # two programs a multiprocessor, or three
    ("gram", "half"): (Blocks(64, 64, 64, 4, 4, 168), Blocks(128, 128, 64, 8, 3, 128)),
    ("gram_grad", "half"): (Blocks(64, 64, 64, 4, 3, 168), Blocks(128, 128, 64, 8, 3, 128)),
}
TABLE = {
    80: _AMPERE,
    86: _with_stages(_AMPERE, {"half": 2, "tf32": 2, "tf32x3": 2}),
    90: _HOPPER,
    100: _HOPPER,
}
# gram_grad with all rows in one tile: (BLOCK_M, halves, float32)
ONE_TILE = {
    64: (Blocks(64, 64, 64, 4, 2), Blocks(64, 64, 32, 4, 2)),
    128: (Blocks(128, 64, 64, 4, 3), Blocks(128, 32, 32, 4, 3)),
    256: (Blocks(256, 64, 64, 8, 3), Blocks(256, 32, 32, 8, 2)),
}
NORMALIZE = (  # the first that holds N rows; beyond the last, the two phases take its blocks of rows
    Slab(64, 64, 4),
    Slab(128, 64, 8),
    Slab(256, 32, 8),
    Slab(512, 16, 8),
)
TWO_PHASES = Slab(128, 64, 8)
MAX_CHUNKS = 16  # of rows, in the two phases


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the choice of blocks depends on, beside the shape."""

    architecture: int  # row of TABLE
    multiprocessors: int
    about: Accelerator = AMPERE

    def gram(self, n: int, dtype: torch.dtype) -> Blocks:
        return self._blocks("gram", dtype, n >= GRAM_MANY_ROWS)

    def correlate(self, d: int, dtype: torch.dtype) -> Blocks:
        tiles = cdiv(d, self._blocks("correlate", dtype).m)
        return self._blocks("correlate", dtype, tiles**2 >= self.multiprocessors)

    def gram_grad(self, n: int, d: int, dtype: torch.dtype, normalized: bool) -> Blocks:
        """With all rows in one tile where they fit."""
        if normalized and n <= (128 if self._few_registers else max(ONE_TILE)):
            return self._fit(next(b for rows, b in ONE_TILE.items() if n <= rows)[precision_of(dtype) != "half"])
        large = self._blocks("gram_grad", dtype)
        programs = 2 * cdiv(d, large.n) * cdiv(n, large.m)
        return self._blocks("gram_grad", dtype, 4 * programs >= 3 * self.multiprocessors)

    def direct_grad(self, n: int, d: int, dtype: torch.dtype) -> Blocks:
        large = self._blocks("direct_grad", dtype)
        return self._blocks("direct_grad", dtype, cdiv(n, large.m) * cdiv(d, large.n) >= self.multiprocessors)

    def resident(self, blocks: Blocks) -> int:
        """How many programs with these blocks a multiprocessor holds; of shared memory each takes 1 KiB more.

        Of other makers' GPUs nothing is assumed.
        """
        if self.about.maker != "nvidia":
            return 1
        shared = blocks.num_stages * (blocks.m + blocks.n) * ROW_BYTES + 1024
        registers = cdiv(blocks.registers, 8) * 8 * 32 * blocks.num_warps
        return max(1, min((self.about.shared_memory + 1024) // shared, REGISTERS // registers))

    def _blocks(self, kernel: str, dtype: torch.dtype, many: bool = True) -> Blocks:
        precision = self.precision(dtype)
        many = many and not self._few_registers
        return self._fit(TABLE[self.architecture][kernel, "tf32x3" if precision == "ieee" else precision][many])

    @property
    def _few_registers(self) -> bool:
        """RDNA, where accumulators are among a thread's 256 registers."""
        return self.about.maker == "amd" and self.about.warp_size == 32

    def _fit(self, blocks: Blocks) -> Blocks:
        """With the stages and warps of another maker's GPUs."""
        if self.about.maker == "nvidia":
            return blocks
        return dataclasses.replace(
            blocks.without_limit(), num_stages=min(blocks.num_stages, 2), num_warps=256 // self.about.warp_size
        )

    def precision(self, dtype: torch.dtype) -> str:
        """What the matrix cores multiply, as precision_of says, of which other makers' can less."""
        return precision_of(dtype, self.about)

    def split(self, n: int, d: int, itemsize: int, blocks: Blocks) -> tuple[int, int]:
        """Into how many slices partial_gram cuts D, and their length in steps of BLOCK_K.

        A multiprocessor's programs take as many steps as their slices have; about 8 more to start, store and hand over,
        which those that share it do at once; and a tile's last phase about 2 a slice. The partial tiles may take the
        memory of the two input gradients, which do not exist yet, and always that of one slice.
        """
        tiles, steps = triangle(n, blocks.m), cdiv(d, blocks.k)
        budget = 2 * n * d * itemsize // (2 * tiles * blocks.m**2 * 4)

        resident = self.resident(blocks)

        def time(slices: int) -> int:
            programs = cdiv(2 * tiles * slices, self.multiprocessors)
            return programs * cdiv(steps, slices) + cdiv(programs, resident) * 8 + 2 * slices

        slices = min(range(1, max(1, min(MAX_SPLIT, budget, steps)) + 1), key=time)
        length = cdiv(steps, slices)
        return cdiv(steps, length), length


def chip(device: torch.device) -> Chip:
    """Of a device of this machine."""
    return chip_of(accelerator.of(device))


@functools.cache
def chip_of(about: Accelerator) -> Chip:
    """Of a device; where Triton's interpreter runs, one that has few programs at once."""
    if not about.is_gpu:
        return Chip(INTERPRETED, INTERPRETED_UNITS)
    return Chip(architecture_of(about), about.units, about)


def architecture_of(about: Accelerator) -> int:
    """The row of TABLE for a GPU: grouped by shared memory and instructions."""
    if about.capability is None:
        return INTERPRETED
    major, minor = about.capability
    if (major == 8 and minor != 0) or major >= 12:
        return 86
    return {8: 80, 9: 90}.get(major, 100)


def has_tma(device: torch.device) -> bool:
    """Whether the device has a tensor memory accelerator that Triton can use, and nobody has turned it off."""
    about = accelerator.of(device)
    if not about.is_gpu:
        return TMA_IN_INTERPRETER
    return about.tma and os.environ.get("BARLOW_FUSED_TRITON_TMA", "1") != "0"


def precision_of(dtype: torch.dtype, about: Accelerator = AMPERE) -> str:
    """What the tensor cores multiply; float32 obeys PyTorch's switch (accelerator.tf32).

    Without TF32 it takes three such products (a_low b_high + a_high b_low + a_high b_high): 2^-22 relative, as accurate
    as float32, on the tensor cores; "ieee" would run on the ordinary cores, several times slower.
    """
    if dtype != torch.float32:
        return "half"
    return about.float32_precision(accelerator.tf32())


def compute_dtype(n: int, d: int, dtype: torch.dtype, normalized: bool) -> torch.dtype:
    """What is multiplied: in small half-precision inputs the rounding of A_hat does not average out.

    Nor does that of K where features are a thousand times as many as samples: bfloat16 gradients were off by 1.2e-2 at
    N = 16, D = 65536.
    """
    exact = normalized and dtype.itemsize == 2 and (n * d <= FLOAT32_ELEMENTS or d >= FLOAT32_RATIO * n)
    return torch.float32 if exact else dtype


def grad_columns(n: int) -> int:
    """How many features' gradients are made at a time where N is several tiles: their row sums take half of K."""
    return max(GRAD_COLUMNS, 32 * n)


def stats_rows(normalized: bool, raw: bool) -> int:
    """Rows of ``stats`` (blocks.py): without standardisation only c; not raw, of float32 A_hat and B_hat, no means."""
    return 1 if not normalized else 9 if raw else 7


def triangle(n: int, block: int) -> int:
    """Tiles of the lower triangle of an (n, n) matrix."""
    rows = cdiv(n, block)
    return rows * (rows + 1) // 2


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def raw_limit(n: int) -> float:
    """|mu_i mu_j| s_i s_j up to which ``correlate`` multiplies z itself.

    Truncation costs C_ij 1e-9 * N of it, which must stay under a hundredth of 1/sqrt(N), the size of unrelated C_ij.
    """
    return min(RAW_LIMIT, 1e7 / n**1.5)


def autotuned() -> bool:
    """Whether Triton shall measure instead of taking the table's word."""
    return os.environ.get("BARLOW_FUSED_TRITON_AUTOTUNE", "0") not in ("", "0")
