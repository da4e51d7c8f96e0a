"""Triton's interpreter with programs that take turns, and a search for races between them.

The interpreter runs one program after the other, so who reads too early what an earlier program writes finds it there.
Under ``interleaved`` the programs of a launch are threads, of which one runs at a time: they begin in random order, and
at each atomic operation the turn may go to another one.

Two accesses of different programs to the same number, one of which writes, must be ordered by atomic operations that
release and acquire (``sem="acq_rel"``), whatever the order in which they happened to run: vector clocks of programs,
as csrc/gpu/emulation/races.cpp has them of threads. A launch's end orders everything. What happens within a program,
between its threads, the interpreter does not know.
"""

from __future__ import annotations

import contextlib
import random
import threading
import types
from collections.abc import Callable, Iterator
from inspect import signature

import numpy as np
from triton._C.libtriton import interpreter as native
from triton.runtime import interpreter

PAGE = 4096
Sem = native.MEM_SEMANTIC


class RaceError(AssertionError):
    """Two programs whose accesses nothing orders."""


class Memory:
    """Who accessed which byte last in a launch, and how far each program knows the others."""

    def __init__(self, programs: int) -> None:
        self.knows = np.zeros((programs, programs), np.int64)  # [program, other]: up to which of its epochs
        self.epochs = np.ones(programs, np.int64)
        self.left: dict[int, np.ndarray] = {}  # at each counter
        self.pages: dict[int, dict[str, np.ndarray]] = {}

    def _page(self, number: int) -> dict[str, np.ndarray]:
        if number not in self.pages:
            names = ("writer", "reader", "other_reader")
            page = {name: np.full(PAGE, -1) for name in names}
            self.pages[number] = page | {f"{name}_epoch": np.zeros(PAGE, np.int64) for name in names}
        return self.pages[number]

    def _check(self, page: dict[str, np.ndarray], at: np.ndarray, program: int, of: str, what: str) -> None:
        """No accesses ``of`` another program that ``program`` does not know."""
        before = page[of][at]
        known = self.knows[program][before] >= page[f"{of}_epoch"][at]
        bad = (before >= 0) & (before != program) & ~known
        if bad.any():
            raise RaceError(f"program {program} {what} {before[bad][0]} {of.split('_')[-1]}, and nothing orders them")

    def access(self, program: int, addresses: np.ndarray, mask: np.ndarray, write: bool) -> None:
        addresses = np.unique(np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[mask])
        for number in np.unique(addresses // PAGE):
            page, at = self._page(int(number)), (addresses[addresses // PAGE == number] % PAGE).astype(np.int64)
            self._check(page, at, program, "writer", "writes over" if write else "reads what")
            if write:
                self._check(page, at, program, "reader", "writes over what")
                self._check(page, at, program, "other_reader", "writes over what")
                page["writer"][at], page["writer_epoch"][at] = program, self.epochs[program]
                page["reader"][at] = page["other_reader"][at] = -1
                continue
            moved = at[(page["reader"][at] >= 0) & (page["reader"][at] != program)]  # two of them are remembered
            page["other_reader"][moved], page["other_reader_epoch"][moved] = (
                page["reader"][moved],
                page["reader_epoch"][moved],
            )
            page["reader"][at], page["reader_epoch"][at] = program, self.epochs[program]

    def update(self, program: int, address: int, sem: Sem) -> None:
        """An atomic operation."""
        knows = self.knows[program]
        left = self.left.setdefault(address, np.zeros_like(knows))
        if sem in (Sem.ACQUIRE, Sem.ACQUIRE_RELEASE):
            np.maximum(knows, left, out=knows)
        if sem in (Sem.RELEASE, Sem.ACQUIRE_RELEASE):
            np.maximum(left, knows, out=left)
            left[program] = self.epochs[program]
            self.epochs[program] += 1


class Programs:
    """The programs of one launch, in random order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.calls: list[tuple[tuple[int, int, int], dict[str, object]]] = []

    def add(self, function: Callable[..., None], arguments: dict[str, object]) -> None:
        """The interpreter comes to a program; at the last one all run."""
        builder = interpreter.interpreter_builder
        self.calls.append((builder.grid_idx, arguments))
        if len(self.calls) == np.prod(builder.grid_dim):
            self._run(function)

    def _run(self, function: Callable[..., None]) -> None:
        self.memory = Memory(len(self.calls))
        self.error: BaseException | None = None
        self.turns = [threading.Semaphore(0) for _ in self.calls]
        self.ended = threading.Semaphore(0)
        self.alive = list(range(len(self.calls)))
        threads = [threading.Thread(target=self._program, args=(i, function)) for i in self.alive]
        for thread in threads:
            thread.start()
        self._pass_on()
        self.ended.acquire()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _pass_on(self) -> None:
        if not self.alive:
            self.ended.release()
            return
        self.current = self.random.choice(self.alive)
        interpreter.interpreter_builder.grid_idx = self.calls[self.current][0]
        self.turns[self.current].release()

    def _program(self, index: int, function: Callable[..., None]) -> None:
        self.turns[index].acquire()
        try:
            if self.error is None:
                function(**self.calls[index][1])
        except BaseException as error:
            self.error = error
        self.alive.remove(index)
        self._pass_on()

    def take_turns(self) -> None:
        """The running program lets another one go on, perhaps."""
        me = self.current
        self._pass_on()
        self.turns[me].acquire()


@contextlib.contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """Launches in the interpreter run their programs in random order, by turns, and a race is an error."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, load, store, rmw = (
        executor.__call__,
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )
    running: list[Programs] = []

    def patched_launch(self: object, *args: object, **kwargs: object) -> None:
        programs, function = Programs(seed), self.fn
        running.append(programs)

        def collect(**arguments: object) -> None:
            programs.add(function, arguments)

        # The interpreter looks at the function's signature and globals
        self.fn = types.FunctionType(
            collect.__code__, function.__globals__, function.__name__, None, collect.__closure__
        )
        self.fn.__signature__ = signature(function)
        try:
            launch(self, *args, **kwargs)
        finally:
            self.fn = function
            running.pop()

    def patched_load(self: object, ptrs: object, mask: object, *rest: object) -> object:
        now = running[-1]
        now.memory.access(now.current, ptrs.data, mask.data.astype(bool), write=False)
        return load(self, ptrs, mask, *rest)

    def patched_store(self: object, ptrs: object, value: object, mask: object, *rest: object) -> object:
        now = running[-1]
        now.memory.access(now.current, ptrs.data, mask.data.astype(bool), write=True)
        return store(self, ptrs, value, mask, *rest)

    def patched_rmw(self: object, op: object, ptr: object, val: object, mask: object, sem: object, scope: object):
        now = running[-1]
        now.take_turns()
        now.memory.update(now.current, int(np.ravel(ptr.data)[0]), self.ir_sem_to_interpreter_sem[sem])
        result = rmw(self, op, ptr, val, mask, sem, scope)
        now.take_turns()
        return result

    executor.__call__ = patched_launch
    builder.create_masked_load, builder.create_masked_store = patched_load, patched_store
    builder.create_atomic_rmw = patched_rmw
    try:
        yield
    finally:
        executor.__call__ = launch
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, rmw
