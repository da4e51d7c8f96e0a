"""The four operations in CUDA C++: this file allocates and calls the extension, ``csrc/`` computes.

Between the launches stands nothing but allocations: no PyTorch operator, no wait for the GPU, so that a call can be
captured in a CUDA graph. No product goes through a library, and no float is added atomically: the same input gives the
same bits.

                 launches                                  saved for the backward pass, beside the inputs
    normalize    1, or 3 where N rows do not fit on chip   stats, and A_hat and B_hat, [2, N, D]
    gram         1                                         K, [2, N, N]
    correlate    1                                         C0, [D, D]
    input_grad   1 (gram), 1 a view (direct)

Rows of A_hat, B_hat, K and C0 begin at multiples of 16 bytes, the largest access of a thread. Dtypes and precision are
as in triton_backend.py, whose limits (``triton_kernels/configs.py``) hold here too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from ..normalization import Normalization
from ..reference import BarlowTwinsTerms
from . import accelerator
from .normalized import Normalized, empty_terms
from .operations import Weights
from .triton_kernels import configs

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kernels.h's DType
ALIGNMENT = 16  # bytes
STATS_ROWS = 11  # kernels.h's stats_rows

_instead: ModuleType | None = None


def use(module: ModuleType | None) -> None:
    """Take the kernels from ``module``, as tests take those compiled for the CPU; None: from the built extension."""
    global _instead
    _instead = module
    for cached in (extension, why_no_extension, why_not_here, warm_up, _plan):
        cached.cache_clear()


@functools.cache
def extension() -> ModuleType:
    """The compiled kernels.

    Raises:
        ImportError: they are not built, or cannot be loaded.
    """
    return _instead or importlib.import_module("barlow_fused._cuda")


@functools.cache
def why_no_extension() -> str | None:
    """Why ``extension`` has nothing to return; None where it has."""
    try:
        extension()
    except ModuleNotFoundError:
        return "the extension is not built; BARLOW_FUSED_CUDA=1 pip install builds it, or says what is missing"
    except ImportError as error:
        return f"the extension cannot be loaded, build it again: {error}"
    return None


@functools.cache
def warm_up(device: torch.device) -> int:
    """Load every kernel onto ``device``, once: the calls to come can be captured in CUDA graphs. Returns how many.

    The first call of an operation does so by itself.
    """
    return extension().warm_up(device.index or 0)


@functools.cache
def why_not_here(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``; None when they can."""
    if _instead is not None and _instead.emulated:
        return None if device.type == "cpu" else f"its kernels are compiled for the CPU; tensors are on {device.type}"
    return accelerator.why_no_gpu(device) or why_no_extension() or _why_old_driver()


def _why_old_driver() -> str | None:
    built, driver = int(extension().cuda_version.split(".")[0]), torch._C._cuda_getDriverVersion() // 1000
    return None if driver >= built else f"it is built with CUDA {built}, and this NVIDIA driver is of CUDA {driver}"


def empty_saved(z_a: Tensor, route: str, normalization: Normalization | None) -> list[Tensor]:
    """Empty tensors of the shapes, strides and dtypes of [product, *saved]."""
    n, d = z_a.shape
    dtype = configs.compute_dtype(n, d, z_a.dtype, normalization is not None)
    product = _empty(z_a, dtype, 2, n, n) if route == "gram" else _empty(z_a, dtype, d, d)
    stats = _empty_stats(z_a, normalization)
    return [product, stats] if normalization is None else [product, stats, _empty(z_a, dtype, 2, n, d)]


def normalize(z_a: Tensor, z_b: Tensor, normalization: Normalization | None) -> Normalized:
    """A_hat and B_hat, and every feature's statistics and c = diag(C) in float32."""
    if z_a.dtype not in DTYPES:
        raise TypeError(f"backend='cuda' takes float32, bfloat16 and float16, got {z_a.dtype}: use backend='torch'")
    n, d = z_a.shape
    normalized = normalization is not None
    convention = normalization or Normalization()
    dtype = configs.compute_dtype(n, d, z_a.dtype, normalized)
    plan = _plan(n, d, z_a.dtype, dtype, tf32(dtype), z_a.device)
    hats = _empty(z_a, dtype, 2, n, d) if normalized else None
    a_hat, b_hat = hats.unbind() if normalized else (None, None)
    stats = _empty_stats(z_a, normalization)
    sums = torch.empty(2, plan.slabs, dtype=torch.float64, device=z_a.device)
    counters = torch.empty(plan.counters, dtype=torch.int32, device=z_a.device)
    partials = stats.new_empty(plan.chunks, 5, d) if plan.chunks > 1 else None
    extension().normalize(
        z_a=matrix(z_a),
        z_b=matrix(z_b),
        a_hat=matrix(a_hat),
        b_hat=matrix(b_hat),
        stats=stats.data_ptr(),
        sums=sums.data_ptr(),
        counters=counters.data_ptr(),
        partials=_pointer(partials),
        counter_count=plan.counters,
        slabs=plan.slabs,
        chunks=plan.chunks,
        n=n,
        d=d,
        eps=convention.eps,
        correction=convention.correction,
        normalized=normalized,
        eps_in_root=convention.eps_added_to == "variance",
        **stream(z_a),
    )
    return Normalized(z_a, z_b, normalization, hats, stats, sums, counters)


def gram(x: Normalized, lambd: float, scale: float, need_grad: bool) -> tuple[BarlowTwinsTerms, Tensor | None]:
    """The terms, and K_a / D and K_b / D, less I - 1 1^T / N where features are standardised, (2, N, N)."""
    n, d = x.z_a.shape
    plan = _plan(n, d, x.z_a.dtype, x.dtype, tf32(x.dtype), x.z_a.device).gram
    a_hat, b_hat = x.views
    k = _empty(x.z_a, x.dtype, 2, n, n) if need_grad else None
    partials = x.stats.new_empty(plan.partials)
    inner = x.sums.new_empty(plan.tiles)
    terms = empty_terms(x.z_a)
    extension().gram(
        a_hat=matrix(a_hat),
        b_hat=matrix(b_hat),
        k=matrix(k),
        partials=partials.data_ptr(),
        inner=inner.data_ptr(),
        n=n,
        d=d,
        block=plan.block,
        split=plan.split,
        steps=plan.steps,
        shift=0.0 if x.normalization is None else 1.0,
        tf32=tf32(x.dtype),
        **_forward(x, terms, lambd, scale),
    )
    return terms, k


def correlate(
    x: Normalized,
    lambd: float,
    scale: float,
    need_grad: bool,
    dtype: torch.dtype | None = None,  # of C: that of what is multiplied, or float32
) -> tuple[BarlowTwinsTerms, Tensor | None]:
    """The terms, and C with its diagonal set to 0, (D, D). Fills the last rows of ``x.stats``."""
    n, d = x.z_a.shape
    plan = _plan(n, d, x.z_a.dtype, x.dtype, tf32(x.dtype), x.z_a.device).correlate
    a_hat, b_hat = x.views
    c = _empty(x.z_a, dtype or x.dtype, d, d) if need_grad else None
    row_sums = x.stats.new_empty(2, plan.tiles, d) if need_grad and x.normalization is not None else None
    off_sums = x.sums.new_empty(plan.tiles**2)
    terms = empty_terms(x.z_a)
    extension().correlate(
        z_a=matrix(x.z_a if x.raw else None),
        z_b=matrix(x.z_b if x.raw else None),
        a_hat=matrix(a_hat),
        b_hat=matrix(b_hat),
        c=matrix(c),
        stats=x.stats.data_ptr(),
        row_sums=_pointer(row_sums),
        off_sums=off_sums.data_ptr(),
        n=n,
        d=d,
        block=plan.block,
        raw_limit=configs.raw_limit(n),
        tf32=tf32(x.dtype),
        **_forward(x, terms, lambd, scale),
    )
    return terms, c


def input_grad(
    x: Normalized,
    product: Tensor,  # what gram or correlate returned
    route: str,
    weights: Weights,
    needs: tuple[bool, bool],  # which of the two gradients are wanted
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dz_a and dL/dz_b, in the inputs' dtype."""
    grads = tuple(torch.empty_like(z) if need else None for z, need in zip((x.z_a, x.z_b), needs, strict=True))
    if any(needs):
        write_grads(x, product, route, weights, grads, x.z_a.shape[1])
    return grads


def write_grads(
    x: Normalized,
    product: Tensor,
    route: str,
    weights: Weights,
    grads: tuple[Tensor | None, Tensor | None],
    k_divisor: int,  # what K was divided by
) -> None:
    """``input_grad`` into tensors of the caller's."""
    n, d = x.z_a.shape
    a_hat, b_hat = map(matrix, x.views)
    launch = extension().gram_grad if route == "gram" else extension().direct_grad
    launch(
        own_a=matrix(x.z_a) if x.raw else a_hat,
        own_b=matrix(x.z_b) if x.raw else b_hat,
        a_hat=a_hat,
        b_hat=b_hat,
        product=matrix(product),
        grad_a=matrix(grads[0]),
        grad_b=matrix(grads[1]),
        stats=x.stats.data_ptr(),
        g_loss=_pointer(weights.g_loss),
        g_on=_pointer(weights.g_on),
        g_off=_pointer(weights.g_off),
        n=n,
        d=d,
        k_divisor=k_divisor,
        lambd=weights.lambd,
        scale=weights.scale,
        normalized=x.normalization is not None,
        raw=x.raw,
        tf32=tf32(x.dtype),
        **stream(x.z_a),
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the extension plans for a shape."""

    slabs: int
    chunks: int
    gram: object  # kernels.h's GramPlan
    correlate: object  # kernels.h's CorrelatePlan

    @functools.cached_property
    def counters(self) -> int:
        """Enough for either route."""
        return max(self.gram.tiles, 2 * self.correlate.tiles) + 1


@functools.lru_cache(maxsize=1024)
def _plan(n: int, d: int, z_dtype: torch.dtype, dtype: torch.dtype, tf32: bool, device: torch.device) -> _Plan:
    warm_up(device)
    kernels, index = extension(), device.index or 0
    slabs = kernels.plan_normalize(n, d, DTYPES[z_dtype], index)
    products = (n, d, DTYPES[dtype], tf32, index)
    return _Plan(slabs.slabs, slabs.chunks, kernels.plan_gram(*products), kernels.plan_correlate(*products))


def tf32(dtype: torch.dtype) -> bool:
    """Whether factors of that dtype are multiplied as one TF32 product; else float32 takes three."""
    return dtype == torch.float32 and accelerator.tf32()


def _forward(x: Normalized, terms: BarlowTwinsTerms, lambd: float, scale: float) -> dict[str, int | float]:
    """The arguments that gram and correlate share."""
    return {
        "sums": x.sums.data_ptr(),
        "slabs": x.sums.shape[1],
        "counters": x.counters.data_ptr(),
        "loss": terms.loss.data_ptr(),
        "on_diag": terms.on_diag.data_ptr(),
        "off_diag": terms.off_diag.data_ptr(),
        "lambd": lambd,
        "scale": scale,
        **stream(x.z_a),
    }


def counter_count(z: Tensor) -> int:
    """How many zeros gram or correlate wants for inputs of this shape, which are multiplied as they are."""
    return _plan(*z.shape, z.dtype, z.dtype, tf32(z.dtype), z.device).counters


def aligned(x: Tensor) -> Tensor:
    """x, or a copy whose rows begin at multiples of 16 bytes."""
    return x if x.shape[-1] * x.element_size() % ALIGNMENT == 0 else _empty(x, x.dtype, *x.shape).copy_(x)


def stream(z: Tensor) -> dict[str, int]:
    """The device, and PyTorch's current stream on it."""
    if z.device.type != "cuda":
        return {"device": 0, "stream": 0}
    index = z.device.index
    return {"device": index, "stream": torch._C._cuda_getCurrentRawStream(index)}


def matrix(x: Tensor | None) -> tuple[int, int, int, int] | None:
    """kernels.h's Matrix; of K_a and K_b stacked, the first."""
    return None if x is None else (x.data_ptr(), *x.stride()[-2:], DTYPES[x.dtype])


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _empty(z: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Rows begin at multiples of 16 bytes."""
    *outer, columns = shape
    step = ALIGNMENT // dtype.itemsize
    pitch = -(-columns // step) * step
    rows = z.new_empty(*outer, pitch, dtype=dtype)
    return rows if pitch == columns else rows[..., :columns]


def _empty_stats(z: Tensor, normalization: Normalization | None) -> Tensor:
    return torch.empty(1 if normalization is None else STATS_ROWS, z.shape[1], dtype=torch.float32, device=z.device)
