"""One shape, from inputs to results: check every method, measure its memory, then time the right ones together."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import torch

from . import accuracy, inputs, machine, memory, profile, timing
from .peers import BASELINE, LossFunction, Peer, fused_choice
from .timing import Summary

LEAST_SECONDS = 2.0  # of timing, also where a budget is spent: enough for a few rounds of what is quick


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for every shape of a run."""

    device: torch.device
    dtype: torch.dtype
    modes: tuple[str, ...]  # of timing.MODES
    rounds: int | None  # None: as many as fit into ``seconds``
    seconds: float  # of timing, a shape
    measure_memory: bool


@dataclasses.dataclass
class ModeResult:
    """A method's times in one mode."""

    message: str | None = None  # why there are none
    calls_per_turn: int | None = None
    parts_s: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # timing.PARTS, one entry a round
    total: Summary | None = None  # of the rounds' sums of the parts, in seconds
    ratio: Summary | None = None  # eager's total / this method's in the same mode, of the rounds' own ratios


@dataclasses.dataclass
class MethodResult:
    """One method at one shape."""

    name: str
    same_loss: bool = True
    status: str = "timed"  # or "wrong", "failed", "out of memory", "skipped" (no room, no time), "unavailable"
    message: str | None = None  # why it was not timed
    loss: float | None = None
    loss_error: float | None = None  # relative to the float64 truth
    grad_errors: tuple[float, float] | None = None
    first_pass_s: float | None = None  # with compilation and set-up
    predicted_extra_bytes: float | None = None
    peak_extra_bytes: int | None = None
    memory_message: str | None = None  # why there is no peak_extra_bytes
    launches: int | None = None  # that one call puts on a GPU: kernels, copies, fills
    times: dict[str, ModeResult] = dataclasses.field(default_factory=dict)  # by mode
    rates_of: str | None = None  # the mode of the following: "graph" where it was measured, else "launches"
    flops_per_s: float | None = None  # 6 N D min(N, D) / median total time
    share_of_matrix_product: float | None = None
    bytes_per_s: float | None = None  # 6 N D numbers / median total time
    share_of_floor: float | None = None  # the shape's floor / median total time

    def failed(self, status: str, message: str) -> None:
        self.status, self.message = status, message


@dataclasses.dataclass
class ShapeResult:
    """All methods at one shape."""

    n: int
    d: int
    fused_route: str  # what "auto" takes
    fused_backend: str
    methods: list[MethodResult]
    truth: str | None = None  # "reference" or "gram": what gradients were checked against; None: nothing ran
    truth_loss: float | None = None
    input_sets: int | None = None  # that the calls rotate over
    rounds: int = 0
    matrix_product_rates: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # before and after rounds
    matrix_product_rate: float | None = None  # the best of them, FLOP/s
    bandwidths: list[float] = dataclasses.field(default_factory=list)  # bytes/s of a copy, before and after the rounds
    floor_s: float | None = None  # max(bytes / best bandwidth, flops / matrix_product_rate)

    @property
    def flops(self) -> int:
        return 6 * self.n * self.d * min(self.n, self.d)

    def bytes(self, itemsize: int) -> int:
        """What any method moves: it reads both inputs twice and writes both gradients."""
        return 6 * self.n * self.d * itemsize


def run_shape(
    peers: list[Peer],
    n: int,
    d: int,
    settings: Settings,
    progress: Callable[[str], object] = print,
    time_left: float = math.inf,  # seconds for this shape
) -> ShapeResult:
    """Everything about one shape. ``progress`` is called with a line on what happens now."""
    device, dtype = settings.device, settings.dtype
    stop = time.perf_counter() + time_left
    methods = [MethodResult(peer.name, same_loss=peer.own_loss is None) for peer in peers]
    shape = ShapeResult(n, d, *fused_choice(n, d, device, dtype), methods)
    if time_left <= 0:
        _skip_all(methods, "no time left")
        return shape
    try:
        progress("float64 truth")
        views = inputs.make_inputs(n, d, dtype, device)
        truth = accuracy.find_truth(*views, 0.8 * machine.free_memory(device))
        sets = inputs.rotating_sets(*views)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not timing.is_out_of_memory(error):
            raise
        _skip_all(methods, str(error) or "the float64 truth does not fit")
        return shape
    shape.truth, shape.truth_loss, shape.input_sets = truth.method, truth.loss, len(sets)
    functions: dict[str, LossFunction] = {}
    turns: dict[timing.Key, timing.Turn] = {}
    for peer, method in zip(peers, methods, strict=True):
        progress(f"{peer.name}: check")
        try:
            loss_function = _check(peer, method, views, truth, stop)
            if loss_function is None:
                continue
            functions[peer.name] = loss_function
            for mode in settings.modes:
                _add_turn(turns, peer, method, mode, loss_function, sets)
        except Exception as error:
            method.failed("out of memory" if timing.is_out_of_memory(error) else "failed", timing.describe(error))
            continue
        if settings.measure_memory:
            progress(f"{peer.name}: memory")
            try:
                if device.type == "cuda":
                    method.peak_extra_bytes = memory.cuda_peak(loss_function, *views)
                else:
                    method.peak_extra_bytes = memory.cpu_peak(peer, n, d, dtype)
            except Exception as error:
                method.memory_message = timing.describe(error)
    del truth
    if turns:
        progress("timing")
        _time(shape, turns, settings, max(LEAST_SECONDS, min(settings.seconds, stop - time.perf_counter())))
    if device.type == "cuda":  # after the timing: the profiler may leave something behind
        for method in methods:
            if method.status == "timed":
                method.launches = profile.count_launches(functions[method.name], *views)
    return shape


def _skip_all(methods: list[MethodResult], message: str) -> None:
    for method in methods:
        method.failed("skipped", message)


_last_compilation_s: dict[str, float] = {}  # how long a compiled method's first pass took at the last shape


def _check(
    peer: Peer, method: MethodResult, views: inputs.Views, truth: accuracy.Truth, stop: float
) -> LossFunction | None:
    """The method's loss function if it can run here and is right; else None, and ``method`` says why."""
    z = views[0]
    if peer.unavailable is not None:
        method.failed("unavailable", peer.unavailable)
        return None
    method.predicted_extra_bytes = needed = peer.bytes_needed(*z.shape, z.dtype, z.device)
    gradients = sum(view.nbytes for view in views)
    if needed + gradients > 0.9 * machine.free_memory(z.device):
        method.failed("skipped", f"needs {(needed + gradients) / 1e9:.3g} GB")
        return None
    last = _last_compilation_s.get(peer.name, 0.0)
    if time.perf_counter() + last > stop and peer.compiled:
        method.failed("skipped", f"no time left (compiling took {last:.0f} s)")
        return None
    loss_function = peer.build()
    if peer.own_loss is not None:
        truth = accuracy.own_truth(peer.own_loss, *views)
    start = time.perf_counter()
    verdict = accuracy.check(loss_function, *views, truth)
    method.first_pass_s = time.perf_counter() - start
    if peer.compiled:
        _last_compilation_s[peer.name] = method.first_pass_s
    method.loss, method.loss_error, method.grad_errors = verdict.loss, verdict.loss_error, verdict.grad_errors
    if verdict.wrong is not None:
        method.failed("wrong", verdict.wrong)
        return None
    return loss_function


def _add_turn(
    turns: dict[timing.Key, timing.Turn],
    peer: Peer,
    method: MethodResult,
    mode: str,
    loss_function: LossFunction,
    sets: list[inputs.Views],
) -> None:
    times = method.times[mode] = ModeResult()
    if mode == "graph" and peer.compiled:
        times.message = "replays graphs of its own: see launches"
        return
    if mode == "graph" and not peer.capturable:
        times.message = "waits for the GPU in between, which a graph cannot hold"
        return
    try:
        turns[peer.name, mode], times.calls_per_turn = timing.make_turn(mode, loss_function, sets)
    except Exception as error:
        if mode != "graph":
            raise
        times.message = timing.describe(error)  # not every method can be captured
        torch.cuda.synchronize()


def _time(shape: ShapeResult, turns: dict[timing.Key, timing.Turn], settings: Settings, seconds: float) -> None:
    device, dtype = settings.device, settings.dtype
    before, bandwidths = machine.matrix_product_rates(device, dtype), machine.bandwidths(device)
    rounds = timing.interleave(turns, settings.rounds, seconds)
    after = machine.matrix_product_rates(device, dtype)
    shape.rounds = rounds.count
    shape.matrix_product_rates = {name: before[name] + after[name] for name in before}
    shape.matrix_product_rate = max(max(rates) for rates in shape.matrix_product_rates.values())
    shape.bandwidths = bandwidths + machine.bandwidths(device)
    bytes_moved = shape.bytes(dtype.itemsize)
    shape.floor_s = max(bytes_moved / max(shape.bandwidths), shape.flops / shape.matrix_product_rate)
    for method in shape.methods:
        if method.status == "timed":
            _summarize(shape, method, rounds, bytes_moved)


def _summarize(shape: ShapeResult, method: MethodResult, rounds: timing.Rounds, bytes_moved: int) -> None:
    for mode, times in method.times.items():
        key = method.name, mode
        if key in rounds.failures:
            times.message = rounds.failures[key]
            method.failed("out of memory" if times.message == "out of memory" else "failed", times.message)
        totals = rounds.total_s(key)
        if method.status != "timed" or not totals:
            continue
        parts = zip(*rounds.parts_s[key], strict=True)
        times.parts_s = {part: list(seconds) for part, seconds in zip(timing.PARTS[mode], parts, strict=True)}
        times.total = timing.summarize(totals)
        if baseline := rounds.total_s((BASELINE, mode)):
            times.ratio = timing.summarize(timing.ratios(baseline, totals))
    for mode in ("graph", "launches"):
        times = method.times.get(mode)
        if method.status == "timed" and times is not None and times.total is not None:
            method.rates_of = mode
            if not method.same_loss:  # it needs other FLOPs
                return
            method.flops_per_s = shape.flops / times.total.median
            method.share_of_matrix_product = method.flops_per_s / shape.matrix_product_rate
            method.bytes_per_s = bytes_moved / times.total.median
            method.share_of_floor = shape.floor_s / times.total.median
            return
