"""Interleaved timing: rounds in which every method takes one turn, and the statistics of such rounds.

A machine drifts: clocks change, neighbours come and go. Methods timed one after the other would each see another
machine, so here each round runs every method once, in an order that rotates from round to round (and turns around
after each full rotation, so that a method does not always follow the same one). A ratio is taken within a round, from
two turns a moment apart, and the median of the rounds' ratios is reported, not the ratio of two medians.

A turn repeats a short pass until it has lasted about 10 ms, and reports the mean of its passes.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .accuracy import gradients
from .peers import LossFunction

TURN_SECONDS = 0.01
MIN_ROUNDS = 5
MAX_ROUNDS = 200

Turn = Callable[[], tuple[float, float]]  # -> seconds of (forward, backward), each the mean of the turn's passes


@dataclasses.dataclass
class Rounds:
    """Raw times, one entry a round: a method that failed has fewer."""

    forward_s: dict[str, list[float]]
    backward_s: dict[str, list[float]]
    orders: list[list[str]]  # of each round
    failures: dict[str, str]  # method -> message

    def total_s(self, name: str) -> list[float]:
        return [f + b for f, b in zip(self.forward_s[name], self.backward_s[name], strict=True)]


@dataclasses.dataclass(frozen=True)
class Summary:
    """A median over rounds, and the spread around it."""

    median: float
    q1: float  # quartiles
    q3: float
    min: float
    max: float

    @property
    def spread(self) -> float:
        """The interquartile range as a fraction of the median."""
        return (self.q3 - self.q1) / self.median


def summarize(values: Sequence[float]) -> Summary:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Summary(median, q1, q3, min(values), max(values))


def ratios(baseline_s: Sequence[float], method_s: Sequence[float]) -> list[float]:
    """Round by round, how many times longer the baseline took: above 1, the method is faster."""
    return [b / m for b, m in zip(baseline_s, method_s, strict=False)]


def order(names: Sequence[str], round_index: int) -> list[str]:
    """The order of one round: rotated by one each round, and reversed in every second full rotation."""
    cycle, shift = divmod(round_index, len(names))
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if cycle % 2 else rotated


def interleave(turns: dict[str, Turn], rounds: int | None, seconds: float) -> Rounds:
    """Run rounds: ``rounds`` of them, or (None) as many as fit into ``seconds``.

    Then there are at least 5, unless one round alone takes longer than the budget, and at most 200. A turn that raises
    takes its method out; the others go on.
    """
    names = list(turns)
    result = Rounds({name: [] for name in names}, {name: [] for name in names}, [], {})
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while names and not _enough(len(result.orders), time.perf_counter() - start, rounds, seconds):
            this_round = order(names, len(result.orders))
            result.orders.append(this_round)
            for name in this_round:
                try:
                    forward, backward = turns[name]()
                except Exception as error:
                    result.failures[name] = describe(error)
                    names.remove(name)
                    continue
                result.forward_s[name].append(forward)
                result.backward_s[name].append(backward)
    finally:
        if collecting:
            gc.enable()
    return result


def _enough(done: int, elapsed: float, rounds: int | None, seconds: float) -> bool:
    if rounds is not None:
        return done >= rounds
    if done == 0:
        return False
    one = elapsed / done
    return done >= MAX_ROUNDS or (elapsed + one > seconds and (done >= MIN_ROUNDS or one > seconds))


def make_turn(loss_function: LossFunction, z_a: Tensor, z_b: Tensor) -> tuple[Turn, int]:
    """A method's turn on these inputs, and how many passes it makes, found by up to three unrecorded passes."""
    time_passes = _cuda_passes if z_a.device.type == "cuda" else _cpu_passes
    shortest = math.inf
    for _ in range(3):
        start = time.perf_counter()
        time_passes(loss_function, z_a, z_b, 1)
        shortest = min(shortest, time.perf_counter() - start)
        if shortest > TURN_SECONDS:
            break
    passes = max(1, min(1000, math.ceil(TURN_SECONDS / shortest)))
    return (lambda: time_passes(loss_function, z_a, z_b, passes)), passes


def _cpu_passes(loss_function: LossFunction, z_a: Tensor, z_b: Tensor, passes: int) -> tuple[float, float]:
    forward = backward = 0.0
    for _ in range(passes):
        start = time.perf_counter()
        loss = loss_function(z_a, z_b)
        middle = time.perf_counter()
        grads = gradients(loss, z_a, z_b)
        backward += time.perf_counter() - middle
        forward += middle - start
        del loss, grads
    return forward / passes, backward / passes


def _cuda_passes(loss_function: LossFunction, z_a: Tensor, z_b: Tensor, passes: int) -> tuple[float, float]:
    """Passes are queued without waiting and timed by events on the GPU, so launches count where they are the limit."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(passes)]
    torch.cuda.synchronize(z_a.device)
    for start, middle, stop in events:
        start.record()
        loss = loss_function(z_a, z_b)
        middle.record()
        grads = gradients(loss, z_a, z_b)
        stop.record()
        del loss, grads
    torch.cuda.synchronize(z_a.device)
    forward = sum(start.elapsed_time(middle) for start, middle, _ in events)  # ms
    backward = sum(middle.elapsed_time(stop) for _, middle, stop in events)
    return forward / passes / 1e3, backward / passes / 1e3


def describe(error: Exception) -> str:
    """An exception in one line."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
