"""Launches of Triton kernels, recorded once and then made without Triton's preparations.

``kernel[grid](...)`` takes 14 to 24 us: it looks at each argument, makes a key of what it finds, and looks the
compiled kernel up. A recorded launch has all that in its plan's key, so from the second call on it goes to the
compiled kernel, with addresses in the place of tensors, in 2 to 4 us. The first call is Triton's own, which compiles.

So is every call where the short way is not known to be right: in the interpreter, while autotuning, on other makers'
devices (whose kernels are also compiled for the size of a tensor's memory), and with versions of Triton whose launcher
nobody has read (``KNOWN``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import accelerator, passes
from .arrays import Array, Memory

KNOWN = ((3, 5), (3, 9))  # the first and the last version of which CompiledKernel.__getitem__ was read: all are alike
LAMBD, SCALE = object(), object()  # in the place of the call's

_version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


@dataclasses.dataclass(frozen=True)
class Block:
    """A tensor descriptor of an array, to be made in each call: the blocks that are loaded by it."""

    array: Tensor | Array  # [M, N]
    rows: int
    columns: int

    def of(self, tensors: Sequence[Tensor | None]) -> Any:
        array = self.array.of(tensors) if isinstance(self.array, Array) else self.array
        return _descriptor(array, self.rows, self.columns)


class Launch:
    """A kernel, its grid and its arguments, by position and by name."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        self._kernel, self._grid, self._arguments, self._options = kernel, grid, arguments, options
        self._compiled: Callable | None = None  # what takes the kernel's arguments, once it is compiled
        self._values: list = []  # the arguments, with gaps for
        self._addresses: list[tuple[int, int, int]] = []  # (position, slot, offset)
        self._others: list[tuple[int, Any]] = []  # (position, LAMBD, SCALE or Block)

    def __call__(
        self,
        addresses: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        lambd: float,
        scale: float,
        stream: int,
    ) -> None:
        if self._compiled is None:
            made = [_value(x, tensors, lambd, scale) for x in self._arguments]
            self._keep(self._kernel[self._grid](*made, **self._options))
            return
        values = self._values.copy()
        for position, slot, offset in self._addresses:
            values[position] = addresses[slot] + offset
        for position, x in self._others:
            values[position] = _value(x, tensors, lambd, scale)
        self._compiled(*values, stream=stream)

    def _keep(self, compiled: Any) -> None:
        """The short way for the next calls, where it is known to be right."""
        if not can_launch(self._kernel, compiled):
            return
        options = self._options
        named = [options[name] for name in self._kernel.arg_names[len(self._arguments) :]]
        self._values = [*self._arguments, *named]
        for position, x in enumerate(self._arguments):
            if isinstance(x, Array):
                self._addresses.append((position, x.slot, x.offset))
            elif x is LAMBD or x is SCALE or isinstance(x, Block):
                self._others.append((position, x))
        grid = (*self._grid, 1, 1)[:3]
        self._compiled = compiled[grid]


def can_launch(kernel: Any, compiled: Any) -> bool:
    """Whether what a kernel's own launch has returned may be launched without it."""
    return (
        KNOWN[0] <= _version <= KNOWN[1]
        and isinstance(kernel, triton.JITFunction)
        and not kernel.pre_run_hooks
        and isinstance(compiled, triton.compiler.CompiledKernel)
        and compiled.metadata.target.backend == "cuda"  # NVIDIA's: AMD's is "hip"
    )


class Recorder:
    """Where the operations record what they launch (passes.py)."""

    lambd, scale = LAMBD, SCALE

    def __init__(self, device: torch.device, scratch: Memory) -> None:
        self.device = device
        self.empty, self.free = scratch.empty, scratch.free
        self._launches: list[Launch] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        self._launches.append(Launch(kernel, grid, arguments, options))

    def launches(self) -> Callable:
        launches = tuple(self._launches)

        def run(addresses: tuple, tensors: tuple, lambd: float, scale: float, stream: int) -> None:
            with accelerator.guard(tensors[0]):
                for launch in launches:
                    launch(addresses, tensors, lambd, scale, stream)

        return run


class Now(passes.Now):
    """Where the operations launch at once, on tensors."""

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        with accelerator.guard(self.like):
            kernel[grid](*(_value(x, (), self.lambd, self.scale) for x in arguments), **options)


def _value(x: Any, tensors: Sequence[Tensor | None], lambd: float, scale: float) -> Any:
    """An argument as Triton takes it."""
    if isinstance(x, (Array, Block)):
        return x.of(tensors)
    return lambd if x is LAMBD else scale if x is SCALE else x


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    accelerator.bind(x.device)
    return TensorDescriptor.from_tensor(x, [rows, columns])
