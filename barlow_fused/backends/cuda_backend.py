"""The four operations in CUDA C++: this file says what is launched, ``csrc/`` computes.

Between the launches stands nothing but allocations: no PyTorch operator, no wait for the GPU, so that a call can be
captured in a CUDA graph. No product goes through a library, and no float is added atomically: the same input gives the
same bits. passes.py plans a pass by running the operations on arrays without memory; the extension keeps a plan's
launches, and makes all of a pass in one call.

                 launches                                  saved for the backward pass, beside the inputs
    normalize    1, or 3 where N rows do not fit on chip   stats, and A_hat and B_hat, [2, N, D]
    gram         1                                         K, [2, N, N]
    correlate    1                                         C0, [D, D]
    input_grad   1 (gram), 1 a view (direct)

Rows of A_hat, B_hat, K and C0 begin at multiples of 16 bytes, the largest access of a thread. Dtypes and precision are
as in triton_backend.py, whose limits (``triton_kernels/configs.py``) hold here too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..normalization import Normalization
from . import accelerator, passes
from .arrays import SLOT_BITS, VECTOR, Memory
from .normalized import Matrix, Normalized
from .passes import Operations, Passes
from .triton_kernels import configs

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kernels.h's DType
STATS_ROWS = 11  # kernels.h's stats_rows

_instead: ModuleType | None = None


def use(module: ModuleType | None) -> None:
    """Take the kernels from ``module``, as tests take those compiled for the CPU; None: from the built extension."""
    global _instead
    _instead = module
    for cached in (extension, why_no_extension, why_not_here, warm_up, _plan):
        cached.cache_clear()
    forget()


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
    return accelerator.why_no_cuda(accelerator.of(device)) or why_no_extension() or _why_old_driver()


@functools.cache
def _why_old_driver() -> str | None:
    """Asked of the driver itself: PyTorch does not say in every version."""
    built, version = int(extension().cuda_version.split(".")[0]), ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "the extension needs NVIDIA's driver, and there is no libcuda.so.1 here"
    driver = version.value // 1000
    return (
        None if driver >= built else f"the extension is built with CUDA {built}, this NVIDIA driver is of CUDA {driver}"
    )


class Recorder:
    """Where the operations record what they launch (passes.py): into the extension's ``Sequence``."""

    def __init__(self, device: torch.device, scratch: Memory) -> None:
        self.device = device
        self.empty, self.free = scratch.empty, scratch.free
        self._sequence = extension().Sequence(device.index or 0, SLOT_BITS)

    def launch(self, kernel: str, **arguments: Any) -> None:
        getattr(self._sequence, kernel)(**arguments)

    def launches(self) -> Callable:
        return self._sequence.launch


class Now(passes.Now):
    """Where the operations launch at once, on tensors."""

    def launch(self, kernel: str, **arguments: Any) -> None:
        getattr(extension(), kernel)(
            **arguments,
            lambd=self.lambd,
            scale=self.scale,
            device=self.device.index or 0,
            stream=accelerator.current_stream(self.device),
        )


def normalize(
    on: Recorder | Now,
    z_a: Matrix,  # [N, D]
    z_b: Matrix,  # [N, D]
    normalization: Normalization | None,
    stats: Matrix,  # [rows, D] out
    hats: Matrix | None,  # [2, N, D] out
) -> Normalized:
    """A_hat and B_hat, and every feature's statistics and c = diag(C) in float32."""
    n, d = z_a.shape
    normalized = normalization is not None
    convention = normalization or Normalization()
    dtype = hats.dtype if normalized else z_a.dtype
    plan = _plan(n, d, z_a.dtype, dtype, tf32(dtype), on.device)
    a_hat, b_hat = hats.unbind() if normalized else (None, None)
    sums = on.empty(torch.float64, 2, plan.slabs)
    counters = on.empty(torch.int32, plan.counters)
    partials = on.empty(torch.float32, plan.chunks, 5, d) if plan.chunks > 1 else None
    on.launch(
        "normalize",
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
    )
    if partials is not None:
        on.free(partials)
    return Normalized(z_a, z_b, normalization, hats, stats, sums, counters)


def gram(
    on: Recorder | Now,
    x: Normalized,
    terms: Sequence[Matrix],  # [] out: loss, on_diag, off_diag
    k: Matrix | None,  # [2, N, N] out: K_a / D and K_b / D, less I - 1 1^T / N where features are standardised
) -> None:
    """The terms, and K for a gradient."""
    n, d = x.z_a.shape
    plan = _plan(n, d, x.z_a.dtype, x.dtype, tf32(x.dtype), on.device).gram
    a_hat, b_hat = x.views
    on.launch(
        "gram",
        a_hat=matrix(a_hat),
        b_hat=matrix(b_hat),
        k=matrix(k),
        partials=on.empty(torch.float32, plan.partials).data_ptr(),
        inner=on.empty(torch.float64, plan.tiles).data_ptr(),
        n=n,
        d=d,
        block=plan.block,
        split=plan.split,
        steps=plan.steps,
        shift=0.0 if x.normalization is None else 1.0,
        tf32=tf32(x.dtype),
        **_reduction(x, terms),
    )


def correlate(
    on: Recorder | Now,
    x: Normalized,
    terms: Sequence[Matrix],  # [] out: loss, on_diag, off_diag
    c: Matrix | None,  # [D, D] out: C with its diagonal set to 0, in the dtype that is multiplied or float32
) -> None:
    """The terms, and C for a gradient. Fills the last rows of ``x.stats``."""
    n, d = x.z_a.shape
    plan = _plan(n, d, x.z_a.dtype, x.dtype, tf32(x.dtype), on.device).correlate
    a_hat, b_hat = x.views
    wanted = c is not None and x.normalization is not None
    row_sums = on.empty(torch.float32, 2, plan.tiles, d) if wanted else None
    on.launch(
        "correlate",
        z_a=matrix(x.z_a if x.raw else None),
        z_b=matrix(x.z_b if x.raw else None),
        a_hat=matrix(a_hat),
        b_hat=matrix(b_hat),
        c=matrix(c),
        stats=x.stats.data_ptr(),
        row_sums=_pointer(row_sums),
        off_sums=on.empty(torch.float64, plan.tiles**2).data_ptr(),
        n=n,
        d=d,
        block=plan.block,
        raw_limit=configs.raw_limit(n),
        tf32=tf32(x.dtype),
        **_reduction(x, terms),
    )


def input_grad(
    on: Recorder | Now,
    x: Normalized,
    product: Matrix,  # of gram or correlate
    route: str,
    g_terms: Sequence[Matrix | None],  # [] the gradients with respect to the terms
    grads: Sequence[Matrix | None],  # [N, D] out: dL/dz_a and dL/dz_b; None for one that is not wanted
    k_divisor: int,  # what K was divided by: D, of all features where x has a part of them
) -> None:
    """The gradients of the inputs, in their dtype."""
    n, d = x.z_a.shape
    a_hat, b_hat = map(matrix, x.views)
    g_loss, g_on, g_off = map(_pointer, g_terms)
    on.launch(
        "gram_grad" if route == "gram" else "direct_grad",
        own_a=matrix(x.z_a) if x.raw else a_hat,
        own_b=matrix(x.z_b) if x.raw else b_hat,
        a_hat=a_hat,
        b_hat=b_hat,
        product=matrix(product),
        grad_a=matrix(grads[0]),
        grad_b=matrix(grads[1]),
        stats=x.stats.data_ptr(),
        g_loss=g_loss,
        g_on=g_on,
        g_off=g_off,
        n=n,
        d=d,
        k_divisor=k_divisor,
        normalized=x.normalization is not None,
        raw=x.raw,
        tf32=tf32(x.dtype),
    )


def _stats_rows(normalized: bool, _: bool) -> int:
    return STATS_ROWS if normalized else 1


OPERATIONS = Operations("cuda", Recorder, _stats_rows, VECTOR, normalize, gram, correlate, input_grad)
_passes = Passes(OPERATIONS)
forward, backward, empty_saved = _passes.forward, _passes.backward, _passes.empty_saved
planned, forget = _passes.planned, _passes.forget


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


def _reduction(x: Normalized, terms: Sequence[Matrix]) -> dict[str, int]:
    """The arguments that gram and correlate share."""
    loss, on_diag, off_diag = (term.data_ptr() for term in terms)
    return {
        "sums": x.sums.data_ptr(),
        "slabs": x.sums.shape[1],
        "counters": x.counters.data_ptr(),
        "loss": loss,
        "on_diag": on_diag,
        "off_diag": off_diag,
    }


def counter_count(z: Tensor) -> int:
    """How many zeros gram or correlate wants for inputs of this shape, which are multiplied as they are."""
    return _plan(*z.shape, z.dtype, z.dtype, tf32(z.dtype), z.device).counters


def with_aligned_rows(x: Tensor) -> Tensor:
    """x, or a copy whose rows begin at multiples of 16 bytes."""
    if x.shape[-1] * x.element_size() % VECTOR == 0:
        return x
    return Now(x).empty(x.dtype, *x.shape, row_bytes=VECTOR).copy_(x)


def matrix(x: Matrix | None) -> tuple[int, int, int, int] | None:
    """kernels.h's Matrix; of K_a and K_b stacked, the first."""
    return None if x is None else (x.data_ptr(), *x.stride()[-2:], DTYPES[x.dtype])


def _pointer(x: Matrix | None) -> int:
    return 0 if x is None else x.data_ptr()
