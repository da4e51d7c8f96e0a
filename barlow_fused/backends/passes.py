"""The passes of a backend of kernels: planned once for each kind of call, then two allocations and the launches.

What a call costs the host counts as much as its kernels where the inputs are small. So all that follows from shapes,
strides, dtypes, alignment and options is worked out once, into a ``Pass``: where each array lies in one allocation,
and each launch with its arguments. A call allocates and hands over addresses; it makes no view of a tensor.

A plan is recorded by running the backend's operations on ``Array``s, which have no memory yet, with a recorder in the
place of the device. The same operations run on tensors at once in the partial operations (kernel_partial.py).

    forward    saved    statistics, A_hat and B_hat, and K or C: what the backward pass needs, one allocation
               scratch  what ends with the call; all of it, where no gradient is wanted
    backward   the gradients, and scratch where the kernels want some

Both are PyTorch's allocations, made anew in each call: safe with streams, graph capture and autograd, like any tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..normalization import Normalization
from . import accelerator
from .accelerator import current_stream
from .arrays import GRAD_A, GRAD_B, LOSS, OFF_DIAG, ON_DIAG, SAVED, SCRATCH, VECTOR, Z_A, Z_B, Array, Memory
from .normalized import Normalized
from .operations import Spec
from .triton_kernels import configs

PLANS = 1024  # kept of each pass; the one that was not used for longest goes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Now:
    """Where the operations run at once, on tensors. A backend's own adds ``launch``."""

    def __init__(self, like: Tensor, lambd: float = 0.0, scale: float = 1.0) -> None:
        self.like, self.device, self.lambd, self.scale = like, like.device, lambd, scale
        self._held: list[Tensor] = []  # until this object ends: launches are given addresses, which keep nothing alive

    def empty(self, dtype: torch.dtype, *shape: int, row_bytes: int = 1) -> Tensor:
        """Memory for an array, laid out as ``Memory`` does."""
        array = Memory(SCRATCH).empty(dtype, *shape, row_bytes=row_bytes)
        padded = (*shape[:-1], array.strides[-2]) if len(shape) > 1 else shape  # to the end of the last row
        memory = torch.empty(padded, dtype=dtype, device=self.device)
        self._held.append(memory[..., : shape[-1]] if shape else memory)
        return self._held[-1]

    def free(self, last: Tensor) -> None:
        """As ``Memory`` does; here all memory ends with this object."""


class Pass(NamedTuple):
    """A plan of a pass."""

    launch: Callable  # of (addresses, tensors, lambd, scale, stream): what the call brings, 0 and None for nothing
    scratch: Memory
    saved: Memory


class Operations(NamedTuple):
    """What a backend of kernels has to say.

    The operations take where they run as their first argument, ``on``: a recorder or a ``Now``, with its ``device``,
    ``empty(dtype, *shape)`` for memory that ends with the pass or with ``free``, ``launch(...)``, and the call's
    ``lambd`` and ``scale``. They write into arrays that they are given.
    """

    name: str
    recorder: Callable  # (device, scratch memory) -> where the operations record; its ``launches()`` are a Pass's
    stats_rows: Callable[[bool, bool], int]  # (normalized, factors are halves) -> of ``stats``
    row_bytes: int  # where rows of A_hat, B_hat, K and C begin
    normalize: Callable  # (on, z_a, z_b, normalization, stats, hats) -> Normalized
    gram: Callable  # (on, x, terms, k); k is None without gradient
    correlate: Callable  # (on, x, terms, c)
    input_grad: Callable  # (on, x, product, route, g_terms, grads, k_divisor)


class Passes:
    """The passes that operations.py describes, of a backend of kernels."""

    def __init__(self, operations: Operations) -> None:
        self._ops = operations
        self._forward_plan = functools.lru_cache(PLANS)(self._plan_forward)
        self._backward_plan = functools.lru_cache(PLANS)(self._plan_backward)

    def forget(self) -> None:
        """Plan again: what plans were made of has changed."""
        self._forward_plan.cache_clear()
        self._backward_plan.cache_clear()

    def planned(self) -> int:
        """How many plans were made since they were last forgotten."""
        return self._forward_plan.cache_info().misses + self._backward_plan.cache_info().misses

    def forward(
        self, z_a: Tensor, z_b: Tensor, spec: Spec, need_grad: bool, every_term: bool
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The terms, and what the backward pass needs (nothing where no gradient is wanted)."""
        a, b, device, dtype, empty = z_a.data_ptr(), z_b.data_ptr(), z_a.device, z_a.dtype, z_a.new_empty
        plan = self._forward_plan(
            z_a.shape,
            dtype,
            z_a.stride(),
            z_b.stride(),
            a % VECTOR == 0,
            b % VECTOR == 0,
            device,
            _tf32(z_a, dtype),
            spec.route,
            spec.normalization,
            need_grad,
            every_term,
        )
        scratch = empty(plan.scratch.bytes, dtype=torch.uint8)
        saved = empty(plan.saved.bytes, dtype=torch.uint8) if need_grad else None
        loss = empty((), dtype=torch.float32)
        tensors = (z_a, z_b, saved, scratch, loss)
        addresses = (a, b, saved.data_ptr() if need_grad else 0, scratch.data_ptr(), loss.data_ptr())
        terms = (loss,)
        if every_term:
            on_diag, off_diag = empty((), dtype=torch.float32), empty((), dtype=torch.float32)
            tensors += (on_diag, off_diag)
            addresses += (on_diag.data_ptr(), off_diag.data_ptr())
            terms += (on_diag, off_diag)
        plan.launch(addresses, tensors, spec.lambd, spec.scale, current_stream(device))
        return terms, [saved] if need_grad else []

    def backward(
        self,
        z_a: Tensor,
        z_b: Tensor,
        saved: list[Tensor],
        spec: Spec,
        g_terms: tuple[Tensor | None, Tensor | None, Tensor | None],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients with respect to z_a and z_b; None in place of one that is not needed."""
        need_a, need_b = needs
        if not (need_a or need_b):
            return None, None
        (memory,) = saved
        if memory.data_ptr() % VECTOR:  # hooks of the user's packed and unpacked it
            memory = memory.clone()
        grad_a = torch.empty_like(z_a) if need_a else None
        grad_b = torch.empty_like(z_b) if need_b else None
        g_loss, g_on, g_off = g_terms
        a, b, device, dtype = z_a.data_ptr(), z_b.data_ptr(), z_a.device, z_a.dtype
        g_addresses = (
            0 if g_loss is None else g_loss.data_ptr(),
            0 if g_on is None else g_on.data_ptr(),
            0 if g_off is None else g_off.data_ptr(),
        )
        plan = self._backward_plan(
            *(z_a.shape, dtype, z_a.stride(), z_b.stride(), a % VECTOR == 0, b % VECTOR == 0, device),
            *(_tf32(z_a, dtype), spec.route, spec.normalization, g_loss is None, g_on is None, g_off is None),
            (g_addresses[0] | g_addresses[1] | g_addresses[2]) % VECTOR == 0,
            grad_a.stride() if need_a else None,
            grad_b.stride() if need_b else None,
        )
        scratch = z_a.new_empty(plan.scratch.bytes, dtype=torch.uint8) if plan.scratch.bytes else None
        plan.launch(
            (
                *(a, b, memory.data_ptr(), 0 if scratch is None else scratch.data_ptr(), *g_addresses),
                *(grad_a.data_ptr() if need_a else 0, grad_b.data_ptr() if need_b else 0),
            ),
            (z_a, z_b, memory, scratch, *g_terms, grad_a, grad_b),
            *(spec.lambd, spec.scale, current_stream(device)),
        )
        return grad_a, grad_b

    def empty_saved(self, z_a: Tensor, route: str, normalization: Normalization | None) -> list[Tensor]:
        """What the forward pass saves, without data."""
        memory = Memory(SAVED)
        self._kept(memory, z_a.shape, z_a.dtype, route, normalization)
        return [z_a.new_empty(memory.bytes, dtype=torch.uint8)]

    def _kept(
        self,
        memory: Memory,
        shape: tuple[int, int],
        dtype: torch.dtype,
        route: str | None,  # None: without product
        normalization: Normalization | None,
    ) -> tuple[Array, Array | None, Array | None]:
        """stats [rows, D], A_hat and B_hat [2, N, D], and the product."""
        n, d = shape
        normalized = normalization is not None
        dtype = configs.compute_dtype(n, d, dtype, normalized)
        rows = self._ops.stats_rows(normalized, dtype != torch.float32)
        stats = memory.empty(torch.float32, rows, d)
        hats = memory.empty(dtype, 2, n, d, row_bytes=self._ops.row_bytes) if normalized else None
        product = None
        if route is not None:
            size = (2, n, n) if route == "gram" else (d, d)
            product = memory.empty(dtype, *size, row_bytes=self._ops.row_bytes)
        return stats, hats, product

    def _plan_forward(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        a_strides: tuple[int, int],
        b_strides: tuple[int, int],
        a_aligned: bool,
        b_aligned: bool,
        device: torch.device,
        tf32: bool,
        route: str,
        normalization: Normalization | None,
        need_grad: bool,
        every_term: bool,
    ) -> Pass:
        self._check(dtype)
        z_a, z_b = Array(Z_A, dtype, shape, a_strides, 0, a_aligned), Array(Z_B, dtype, shape, b_strides, 0, b_aligned)
        saved, scratch = Memory(SAVED), Memory(SCRATCH)
        on = self._ops.recorder(device, scratch)
        kept = (saved, shape, dtype, route) if need_grad else (scratch, shape, dtype, None)
        stats, hats, product = self._kept(*kept, normalization)
        terms = [
            _scalar(slot) if every_term or slot == LOSS else scratch.empty(torch.float32)
            for slot in (LOSS, ON_DIAG, OFF_DIAG)
        ]
        x = self._ops.normalize(on, z_a, z_b, normalization, stats, hats)
        reduce = self._ops.gram if route == "gram" else self._ops.correlate
        reduce(on, x, terms, product)
        return Pass(on.launches(), scratch, saved)

    def _plan_backward(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        a_strides: tuple[int, int],
        b_strides: tuple[int, int],
        a_aligned: bool,
        b_aligned: bool,
        device: torch.device,
        tf32: bool,
        route: str,
        normalization: Normalization | None,
        no_loss: bool,
        no_on: bool,
        no_off: bool,
        g_aligned: bool,
        grad_a_strides: tuple[int, int] | None,
        grad_b_strides: tuple[int, int] | None,
    ) -> Pass:
        self._check(dtype)
        z_a, z_b = Array(Z_A, dtype, shape, a_strides, 0, a_aligned), Array(Z_B, dtype, shape, b_strides, 0, b_aligned)
        saved, scratch = Memory(SAVED), Memory(SCRATCH)
        on = self._ops.recorder(device, scratch)
        stats, hats, product = self._kept(saved, shape, dtype, route, normalization)
        g_terms = [
            None if missing else _scalar(slot, g_aligned)
            for slot, missing in ((LOSS, no_loss), (ON_DIAG, no_on), (OFF_DIAG, no_off))
        ]
        grads = [
            None if strides is None else Array(slot, dtype, shape, strides)
            for slot, strides in ((GRAD_A, grad_a_strides), (GRAD_B, grad_b_strides))
        ]
        x = Normalized(z_a, z_b, normalization, hats, stats)
        self._ops.input_grad(on, x, product, route, g_terms, grads, shape[1])
        return Pass(on.launches(), scratch, saved)

    def _check(self, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise TypeError(
                f"backend={self._ops.name!r} takes float32, bfloat16 and float16, got {dtype}: use backend='torch'"
            )


def _tf32(z: Tensor, dtype: torch.dtype) -> bool:
    """Whether float32 factors are one TF32 product; False where there are none, which saves asking PyTorch."""
    return configs.compute_dtype(*z.shape, dtype, normalized=True) == torch.float32 and accelerator.tf32()


def _scalar(slot: int, aligned: bool = True) -> Array:
    return Array(slot, torch.float32, (), (), 0, aligned)
