"""Interleaved timing: rounds in which every method takes one turn in every mode, and the statistics of such rounds.

A machine drifts: clocks change, neighbours come and go. Methods timed one after the other would each see another
machine, so here each round runs every method once, in an order that rotates from round to round (and turns around
after each full rotation, so that a method does not always follow the same one). A ratio is taken within a round, from
two turns a moment apart, and the median of the rounds' ratios is reported, not the ratio of two medians.

A turn repeats a short call until it has lasted about 10 ms, over the rotating input sets, and reports the mean call.
Modes:

launches   forward and backward, each issued from Python; on GPUs timed by events
graph      forward and backward on every input set, captured in one CUDA graph, replayed
forward    the loss alone, without gradients
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .accuracy import gradients
from .inputs import Views
from .peers import LossFunction

MODES = ("launches", "graph", "forward")
PARTS = {"launches": ("forward", "backward"), "graph": ("total",), "forward": ("forward",)}  # what a turn tells apart
TURN_SECONDS = 0.01
MIN_ROUNDS = 5
MAX_ROUNDS = 60

Key = tuple[str, str]  # a method's name, and a mode
Turn = Callable[[], tuple[float, ...]]  # -> seconds of each part of a call, the mean of the turn's calls
Measure = Callable[[int], tuple[float, ...]]  # the same for a number of calls


@dataclasses.dataclass
class Rounds:
    """Raw times, one entry a round: a turn that failed has fewer."""

    parts_s: dict[Key, list[tuple[float, ...]]]
    count: int
    failures: dict[Key, str]  # -> message

    def total_s(self, key: Key) -> list[float]:
        return [sum(parts) for parts in self.parts_s.get(key, [])]


@dataclasses.dataclass(frozen=True)
class Summary:
    """A median over rounds, and the spread around it."""

    median: float
    q1: float  # quartiles
    q3: float
    min: float
    max: float


def summarize(values: Sequence[float]) -> Summary:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Summary(median, q1, q3, min(values), max(values))


def ratios(baseline_s: Sequence[float], method_s: Sequence[float]) -> list[float]:
    """Round by round, how many times longer the baseline took: above 1, the method is faster."""
    return [b / m for b, m in zip(baseline_s, method_s, strict=False)]


def order(keys: Sequence[Key], round_index: int) -> list[Key]:
    """The order of one round: rotated by one each round, and reversed in every second full rotation."""
    cycle, shift = divmod(round_index, len(keys))
    rotated = [*keys[shift:], *keys[:shift]]
    return rotated[::-1] if cycle % 2 else rotated


def interleave(turns: dict[Key, Turn], rounds: int | None, seconds: float) -> Rounds:
    """Run rounds: ``rounds`` of them, or (None) as many as fit into ``seconds``.

    Then there are at least 5, unless one round alone takes longer than the budget, and at most 60. A turn that raises
    is taken out; the others go on.
    """
    keys = list(turns)
    result = Rounds({key: [] for key in keys}, 0, {})
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while keys and not _enough(result.count, time.perf_counter() - start, rounds, seconds):
            for key in order(keys, result.count):
                try:
                    result.parts_s[key].append(turns[key]())
                except Exception as error:
                    result.failures[key] = describe(error)
                    keys.remove(key)
            result.count += 1
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


def make_turn(mode: str, loss_function: LossFunction, sets: list[Views]) -> tuple[Turn, int]:
    """A method's turn over these input sets, and how many calls it makes, found by up to three unrecorded ones."""
    measure = _measure(mode, loss_function, sets)
    shortest = math.inf
    for _ in range(3):
        shortest = min(shortest, sum(measure(1)))
        if shortest > TURN_SECONDS:
            break
    calls = max(1, min(1000, math.ceil(TURN_SECONDS / shortest)))
    return (lambda: measure(calls)), calls


def _measure(mode: str, loss_function: LossFunction, sets: list[Views]) -> Measure:
    if mode == "graph":
        return _replays(loss_function, sets)
    # what a call does, in the steps that are told apart: each takes the inputs and what the step before gave
    steps = {
        "launches": (lambda z, _: loss_function(*z), lambda z, loss: gradients(loss, *z)),
        "forward": (lambda z, _: _without_gradients(loss_function, z),),
    }[mode]
    views = itertools.cycle(sets)
    clock = _by_events if sets[0][0].device.type == "cuda" else _by_the_clock
    return lambda calls: clock(steps, views, calls)


def _without_gradients(loss_function: LossFunction, z: Views) -> Tensor:
    with torch.no_grad():
        return loss_function(*z)


def _by_the_clock(steps: Sequence[Callable], views: itertools.cycle, calls: int) -> tuple[float, ...]:
    seconds = [0.0] * len(steps)
    for _ in range(calls):
        z, result = next(views), None
        for i, step in enumerate(steps):
            start = time.perf_counter()
            result = step(z, result)
            seconds[i] += time.perf_counter() - start
    return tuple(total / calls for total in seconds)


def _by_events(steps: Sequence[Callable], views: itertools.cycle, calls: int) -> tuple[float, ...]:
    """Calls are queued without waiting and timed by events on the GPU, so launches count where they are the limit."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)] for _ in range(calls)]
    torch.cuda.synchronize()
    for marks in events:
        z, result = next(views), None
        marks[0].record()
        for step, mark in zip(steps, marks[1:], strict=True):
            result = step(z, result)
            mark.record()
    torch.cuda.synchronize()
    return tuple(sum(marks[i].elapsed_time(marks[i + 1]) for marks in events) / calls / 1e3 for i in range(len(steps)))


def _replays(loss_function: LossFunction, sets: list[Views]) -> Measure:
    """One graph holds a call on every input set; ``calls`` is rounded up to whole replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call sets up may not be captured
        for _ in range(2):
            gradients(loss_function(*sets[0]), *sets[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for z in sets:
            gradients(loss_function(*z), *z)

    def measure(calls: int) -> tuple[float, ...]:
        replays = math.ceil(calls / len(sets))
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        return (start.elapsed_time(stop) / 1e3 / (replays * len(sets)),)

    return measure


def describe(error: Exception) -> str:
    """An exception in one line."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
