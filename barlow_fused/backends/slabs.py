"""What both routes of the torch backend share on CPUs: slabs of the inputs, and the faster matrix product.

* **Slabs.** A slab is some of the features, or some of the samples, of both views: as many as a core's cache holds.
  What is made of one is in the cache when it is multiplied, and its room is used again for the next.
* **The faster matrix product.** ``torch.mm`` in float32 goes to MKL, which uses AVX2 on AMD processors; where a CPU has
  AVX-512, oneDNN generates code for it and is up to twice as fast, at the same float32 accuracy. With AVX2 alone oneDNN
  is the faster for few rows, and MKL, by a third, for many (benchmarks/NOTES.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..normalization import Normalization
from ..reference import BarlowTwinsTerms
from . import accelerator
from .operations import Weights

SLAB_ELEMENTS = 2**19  # a float32 slab of 2 MiB: two cores' L2 caches; with fewer, calls and waiting would show
MIN_SLAB = 2048  # rows or columns: enough for the matrix product to run at full rate
NARROW_SLAB = 64  # columns, where nothing is multiplied: a few cache lines of a row
FEW_SAMPLES = 32  # at least, and one in FEW_OF, of which a first mean is taken
FEW_OF = 16
MEANS = 3  # times that a mean is taken, at most: the second is that of all samples, the third what rounding left of it
ONEDNN_MIN_FLOPS = 1e7  # below this, oneDNN's 20 us of set-up cost more than it saves
ONEDNN_MAX_ROWS = math.inf if "AVX512" in torch.backends.cpu.get_cpu_capability() else 64  # above, MKL is faster

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_ALL = slice(None)


@dataclasses.dataclass
class Normalized:
    """Two views, and the statistics of every feature, which a route computes on its first walk over the inputs."""

    z_a: Tensor  # [N, D]
    z_b: Tensor  # [N, D]
    normalization: Normalization | None  # None: the inputs are used as they are, and there are no statistics
    c: Tensor | None = None  # [D] diag(C), in the dtype that everything is computed in
    # rstd, biased variance, and what each route adds: mean or kept views first. [2, 1, D], two views, if not said.
    stats: tuple[Tensor, ...] = ()

    made = False  # whether slabs are made when they are asked for, centred already (linear/slabs.py)

    def slab(self, rows: slice, columns: slice, less: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Some samples or features of both views, [2, rows, columns], minus ``less``."""
        return _stack(self.z_a, self.z_b, rows, columns, less, out)

    def columns(self) -> Iterator[slice]:
        """The slabs of features."""
        n, d = self.z_a.shape
        return _slabs(d, n)

    def few_means(self, out: Tensor) -> Tensor:
        """Each feature's mean over a few samples."""
        return few_means(self.z_a, self.z_b, out)

    def gradients(self, views: list[int], whole: bool) -> Gradients:
        """Where a backward pass puts dL/dz of these views, all at once or by slabs."""
        return Gradients((self.z_a, self.z_b), views, whole)

    def saved(self) -> list[Tensor]:
        """What a backward pass needs, beside the inputs, to build this again."""
        return [self.c, *self.stats]

    @classmethod
    def from_saved(
        cls, z_a: Tensor, z_b: Tensor, normalization: Normalization | None, saved: list[Tensor]
    ) -> Normalized:
        """Build again what ``saved`` was taken from."""
        return cls(z_a, z_b, normalization, saved[0], tuple(saved[1:]))


class Gradients:
    """dL/dz of both views, [N, D], in the inputs' dtype: what a backward pass puts together from slabs."""

    def __init__(self, inputs: tuple[Tensor, Tensor], views: list[int], whole: bool) -> None:
        self._dtype = inputs[0].dtype
        self._of_view: list[Tensor | None] = [None, None]
        if not whole:
            for view in views:
                self._of_view[view] = torch.empty_like(inputs[view])

    def room(self, view: int, index: tuple[slice, slice], dtype: torch.dtype) -> Tensor | None:
        """Where a slab's gradient may be written; None where it is in another dtype, or whole."""
        grad = self._of_view[view]
        return None if grad is None or grad.dtype != dtype else grad[index]

    def put(self, view: int, index: tuple[slice, slice], grad: Tensor, room: Tensor | None) -> None:
        """A slab's gradient, which is in ``room`` if that was not None."""
        if self._of_view[view] is None:
            self._of_view[view] = grad.to(self._dtype)
        elif room is None:
            self._of_view[view][index] = grad

    def end(self, index: tuple[slice, slice]) -> None:
        """All views of a slab were put."""

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients; None of a view that was not wanted."""
        return self._of_view[0], self._of_view[1]


def _terms(c: Tensor, off_diag: Tensor | float, lambd: float, scale: float) -> BarlowTwinsTerms:
    """The terms, in float64 as c: numbers, or of tensors without data tensors."""
    error = c - 1
    on_diag = _scalar(torch.dot(error, error))
    return BarlowTwinsTerms(scale * (on_diag + lambd * off_diag), on_diag, off_diag)


def _terms_of_gram(x: Normalized, inner: Tensor | float, lambd: float, scale: float) -> BarlowTwinsTerms:
    """The terms from <K_a, K_b> = N^2 ||C||^2."""
    c = x.c.double()
    off_diag = inner / x.z_a.shape[0] ** 2 - _scalar(torch.dot(c, c))
    off_diag = off_diag.clamp_min(0) if isinstance(off_diag, Tensor) else max(off_diag, 0.0)  # NaN stays NaN in both
    return _terms(c, off_diag, lambd, scale)


def weights_of(x: Normalized, weights: Weights) -> tuple[Tensor | float, Tensor]:  # [], [D]
    """alpha, and d, of ``torch_slabs.input_grad``."""
    g_loss, g_on, g_off, lambd, scale = weights
    w_on, w_off = Weights(_number(g_loss), _number(g_on), _number(g_off), lambd, scale).of_sums()
    n = x.z_a.shape[0]
    return w_off * (2 / n), (x.c - 1).mul_(w_on * (2 / n))


def _number(g: Tensor | None) -> Tensor | float | None:
    return None if g is None else _scalar(g)


def _scalar(x: Tensor) -> Tensor | float:
    """A 0-d tensor as Python's number, which is faster to compute with; one without data, fake or on meta, as it is."""
    return x.item() if type(x) is Tensor and x.is_cpu else x


def _compute_dtype(z: Tensor) -> torch.dtype:
    return z.dtype if z.dtype.itemsize >= 4 else torch.float32  # promote_types, which is an operator, takes 1 us


def _stack(
    z_a: Tensor, z_b: Tensor, rows: slice, columns: slice, less: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """A slab of both views, [2, rows, columns], minus ``less``, in the dtype that everything is computed in."""
    if (rows, columns) != (_ALL, _ALL):
        z_a, z_b = z_a[rows, columns], z_b[rows, columns]
    if out is None or out.shape[1:] != z_a.shape:
        out = z_a.new_empty(2, *z_a.shape, dtype=_compute_dtype(z_a))
    if less is None:
        return torch.stack((z_a, z_b), out=out)
    for z, mean, centred in zip((z_a, z_b), less.unbind(), out.unbind(), strict=True):
        torch.sub(z, mean, out=centred)
    return out


def _view(room: Tensor, *shape: int) -> Tensor:
    """The beginning of flat ``room``, in that shape."""
    return room[: math.prod(shape)].view(shape)


def few_means(z_a: Tensor, z_b: Tensor, out: Tensor) -> Tensor:  # [2, 1, D]
    """Each feature's mean over a few samples."""
    step = max(1, min(len(z_a) // FEW_SAMPLES, FEW_OF))
    for z, mean in zip((z_a, z_b), out, strict=True):
        torch.mean(z[::step], 0, keepdim=True, dtype=out.dtype, out=mean)
    return out


def sums_of(slab: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:  # [2, N, D], [3, N, D] -> [2, 1, D], [3, 1, D]
    """Of A and B, the sums over samples; those of A A, B B and A B, for which ``squares`` is the room."""
    torch.mul(slab, slab, out=squares[:2])
    torch.mul(slab[0], slab[1], out=squares[2])
    return slab.sum(1, keepdim=True), squares.sum(1, keepdim=True)


def without_rest(moments: Tensor, rest: Tensor, out: Tensor) -> bool:
    """Takes off the means of A A, B B and A B, (3, 1, D), what those of A and B make of them; variances go to ``out``.

    Returns whether a mean is more than its feature's deviation (never in tensors without data): then that was inexact.
    """
    square = rest * rest
    torch.sub(moments[:2], square, out=out)
    moments[2].addcmul_(rest[0], rest[1], value=-1)
    far = out < square
    out.clamp_min_(0)  # a constant feature's variance may be rounded to less
    return type(far) is Tensor and bool(far.any())


def _like(x: Tensor, last: Tensor | None) -> Tensor:
    """Room for a tensor like ``x``: the ``last`` slab's, which costs no new pages, or new."""
    return torch.empty_like(x) if last is None or last.shape != x.shape else last


def _slabs(length: int, other: int, least: int = MIN_SLAB) -> Iterator[slice]:
    """Cut ``length`` columns (or rows) of ``other`` elements each into slabs, each of at least ``least`` of them."""
    step = max(least, SLAB_ELEMENTS // other)
    if length <= step:
        yield _ALL
        return
    for start in range(0, length, step):
        yield slice(start, start + step)


def _narrow(slab: slice, length: int, other: int) -> Iterator[tuple[slice, slice]]:
    """Cut a slab of ``length`` columns or rows again, for what is not multiplied: where a part is, and where in it."""
    whole = range(length)[slab]
    for part in _slabs(len(whole), other, NARROW_SLAB):
        inner = range(len(whole))[part]
        yield slice(whole.start + inner.start, whole.start + inner.stop), part


def _cut(per_feature: Tensor, columns: slice) -> Tensor:
    """The part of a per-feature tensor that belongs to a slab."""
    return per_feature if columns == _ALL else per_feature[..., columns]


def _by_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether oneDNN multiplies x @ y.T fastest, of matrices or of batches, one after the other."""
    rows = x.shape[-2]
    return (
        2 * rows * x.shape[-1] * y.shape[-2] > ONEDNN_MIN_FLOPS
        and x.is_cpu
        and rows <= ONEDNN_MAX_ROWS
        and x.dtype == torch.float32
        and _ONEDNN is not None
    )


def _matmul_t(
    x: Tensor, y: Tensor, input_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:  # [M, K], [L, K], [L] -> [M, L]
    """x @ y.T + bias by the library that multiplies fastest; on accelerators in the inputs' dtype with float32 sums."""
    if _by_onednn(x, y):
        return _ONEDNN(x, y, bias, "none", [], "")
    if x.device.type != "cpu" and input_dtype in (torch.float16, torch.bfloat16):
        product = accelerator.matmul(x.to(input_dtype), y.to(input_dtype).T)
        return product if bias is None else product.add_(bias)
    return x @ y.T if bias is None else torch.addmm(bias, x, y.T)
