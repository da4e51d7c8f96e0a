"""The verified backends timed against each other, against PyTorch's operators and against the usual implementation.

Forward and backward, issued from Python, host time included, as a training step has it. Rounds are interleaved: each
backend has one turn in each, and a busy GPU slows all of them.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..backends import accelerator
from ..loss import barlow_twins_loss
from ..reference import reference_loss
from .checks import BATCH_NORM, inputs
from .record import FEATURES, SAMPLES, Times, Unit

TURN_SECONDS = 0.01  # of repeated calls
ROUNDS = 7
STEADY = 0.2  # of the median: how far apart the quartiles of the torch backend's turns may lie
USUAL_BYTES = 20  # the usual implementation's need, in D^2
UNKNOWN_BYTES = 4 * 2**30  # of memory that a device does not tell
TOO_SLOW = 2.0  # seconds of one call, after which it is not called again


def shapes() -> list[tuple[int, int, str]]:
    """N, D and the route that "auto" takes, the most usual shapes first: time may not suffice for all."""
    grid = [(n, d, "gram" if 2 * n <= d else "direct") for n in SAMPLES for d in FEATURES]
    return sorted(grid, key=lambda shape: (shape[1] == max(FEATURES), abs(shape[0] - 512), -shape[1]))


def measure(
    units: list[Unit], dtype: str, n: int, d: int, route: str, device: torch.device, begin: Callable[[str], None]
) -> Times:
    """One shape's times. ``begin`` is told which backend is about to run for the first time."""
    names = ["torch", *sorted({u.backend for u in units if (u.dtype, u.route, u.ranks) == (dtype, route, False)})]
    z_a, z_b = (z.requires_grad_() for z in inputs(Unit("", dtype, route), device, n, d))
    calls: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(barlow_twins_loss, z_a, z_b, backend=name, route=route) for name in names
    }
    if USUAL_BYTES * d * d <= (accelerator.free_memory(device) or UNKNOWN_BYTES) / 4:
        calls["usual"] = lambda: reference_loss(z_a, z_b, normalization=BATCH_NORM).loss
    counts = {}
    for name in list(calls):
        begin(name)
        count = _warm_up(calls[name], z_a, z_b, device)
        if count is None:
            del calls[name]
        else:
            counts[name] = count
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if counts[name] or not turns[name]:
                turns[name].append(_turn(call, z_a, z_b, max(1, counts[name]), device))
    medians = {name: statistics.median(each) for name, each in turns.items()}
    return Times(dtype, route, n, d, medians, _is_steady(turns["torch"]) if "torch" in turns else False)


def pending(units: list[Unit]) -> Iterator[tuple[str, int, int, str]]:
    """What is worth timing: dtype, N, D, route."""
    for n, d, route in shapes():
        for dtype in ("bfloat16", "float32", "float16"):
            if any((u.dtype, u.route, u.ranks) == (dtype, route, False) for u in units):
                yield dtype, n, d, route


def _warm_up(call: Callable[[], Tensor], z_a: Tensor, z_b: Tensor, device: torch.device) -> int | None:
    """How many calls a turn repeats, 0 for a single turn; None where there is not the memory."""
    try:
        first = _turn(call, z_a, z_b, 1, device)  # compiles
        seconds = first if first > TOO_SLOW else min(_turn(call, z_a, z_b, 1, device) for _ in range(2))
    except torch.OutOfMemoryError:
        accelerator.empty_cache(device)
        return None
    return 0 if seconds > TOO_SLOW / 10 else max(1, round(TURN_SECONDS / seconds))


def _turn(call: Callable[[], Tensor], z_a: Tensor, z_b: Tensor, count: int, device: torch.device) -> float:
    accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        torch.autograd.grad(call(), (z_a, z_b))
    accelerator.synchronize(device)
    return (time.perf_counter() - start) / count


def _is_steady(turns: list[float]) -> bool:
    q1, median, q3 = statistics.quantiles(turns, n=4, method="inclusive") if len(turns) > 1 else [turns[0]] * 3
    return q3 - q1 <= STEADY * median
