"""Arrays without memory: where a plan says that each array of a call will lie.

A call brings tensors, by slot. An ``Array`` is a part of one of them, and answers what the operations of a backend ask
a tensor; ``Memory`` lays arrays out in one allocation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: where arrays begin in an allocation, as CUDA's own allocations do
VECTOR = 16  # bytes: the largest access of a thread
GAP = 0  # bytes at least between two arrays; tests leave some, and look for what is read or written there

# What a call brings, in the order of its addresses. The terms are in the backward pass their gradients.
Z_A, Z_B, SAVED, SCRATCH, LOSS, ON_DIAG, OFF_DIAG, GRAD_A, GRAD_B = range(9)
SLOT_BITS = 48  # an Array's address is (slot + 1) << SLOT_BITS, plus an offset in bytes; 0 is none


@dataclasses.dataclass(frozen=True)
class Array:
    """A tensor without memory, for plans: which of the call's allocations it lies in, and where."""

    slot: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int = 0  # bytes
    aligned: bool = True  # to VECTOR

    def data_ptr(self) -> int:
        """The address of its first element, once a call brings what its slot stands for."""
        return (self.slot + 1 << SLOT_BITS) + self.offset

    def stride(self, dim: int | None = None) -> tuple[int, ...] | int:
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def unbind(self) -> tuple[Array, ...]:
        step = self.strides[0] * self.dtype.itemsize
        return tuple(
            dataclasses.replace(self, shape=self.shape[1:], strides=self.strides[1:], offset=self.offset + i * step)
            for i in range(self.shape[0])
        )

    def flatten(self, _: int, last: int) -> Array:
        """The dimensions up to ``last`` as one, which they are in memory."""
        shape = (math.prod(self.shape[: last + 1]), *self.shape[last + 1 :])
        return dataclasses.replace(self, shape=shape, strides=self.strides[last:])

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The tensor, as a view of what a call brings."""
        base = tensors[self.slot]
        if self.slot not in (SAVED, SCRATCH):
            return base
        elements = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        memory = base.narrow(0, self.offset, elements * self.dtype.itemsize)
        return memory.view(self.dtype).as_strided(self.shape, self.strides)


def aligned(x: Tensor | Array) -> bool:
    """Whether the first element of x is where the largest access may begin."""
    return x.aligned if isinstance(x, Array) else x.data_ptr() % VECTOR == 0


class Memory:
    """One allocation, and the arrays in it one after the other."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.bytes = 0  # of the allocation
        self.gaps: list[tuple[int, int]] = []  # after each array, from its last byte to the next array or the end
        self._taken = 0

    def empty(self, dtype: torch.dtype, *shape: int, row_bytes: int = 1) -> Array:
        """A contiguous array, or one whose rows begin at multiples of ``row_bytes``."""
        step = max(1, row_bytes // dtype.itemsize)
        padded = (*shape[:-1], -(-shape[-1] // step) * step) if shape else ()
        strides = tuple(math.prod(padded[dim + 1 :]) for dim in range(len(shape)))
        array = Array(self.slot, dtype, shape, strides, self._taken)
        end = self._taken + math.prod(padded) * dtype.itemsize
        self._taken = -(-(end + GAP) // ALIGNMENT) * ALIGNMENT
        self.bytes = max(self.bytes, self._taken)
        self.gaps.append((end, self._taken))
        return array

    def free(self, last: Array) -> None:
        """The array that was made last is not used beyond what was launched so far: the next takes its place."""
        if not GAP:
            self._taken = last.offset
