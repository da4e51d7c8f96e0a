"""One shape, from inputs to results: check every method, measure its memory, then time the right ones together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from . import accuracy, machine, memory, timing
from .peers import BASELINE, FUSED, Peer, fused_choice
from .timing import Summary


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for every shape of a run."""

    device: torch.device
    dtype: torch.dtype
    rounds: int | None  # None: as many as fit into ``seconds``
    seconds: float
    measure_memory: bool


@dataclasses.dataclass
class MethodResult:
    """One method at one shape."""

    name: str
    status: str = "timed"  # or "wrong", "failed", "out of memory", "skipped" (would not fit), "unavailable"
    message: str | None = None  # why it was not timed
    loss: float | None = None
    loss_error: float | None = None  # relative to the float64 truth
    grad_errors: tuple[float, float] | None = None
    first_pass_s: float | None = None  # with compilation and set-up
    passes_per_turn: int | None = None
    peak_extra_bytes: int | None = None
    memory_message: str | None = None  # why there is no peak_extra_bytes
    forward_s: list[float] = dataclasses.field(default_factory=list)  # one entry a round
    backward_s: list[float] = dataclasses.field(default_factory=list)
    forward: Summary | None = None  # of the rounds, in seconds
    backward: Summary | None = None
    total: Summary | None = None
    ratio: Summary | None = None  # the usual implementation's total time / this method's, of the rounds' own ratios
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
    truth: str | None  # "reference" or "gram": what gradients were checked against; None: nothing ran
    truth_loss: float | None
    fused_route: str  # what "auto" takes
    fused_backend: str
    methods: list[MethodResult]
    orders: list[list[str]]  # of the methods in each round
    matrix_product_rates: dict[str, list[float]]  # FLOP/s, before and after the rounds
    matrix_product_rate: float | None  # the best of them
    bandwidths: list[float] = dataclasses.field(default_factory=list)  # bytes/s of a copy, before and after the rounds
    floor_s: float | None = None  # max(bytes / best bandwidth, flops / matrix_product_rate)

    def method(self, name: str) -> MethodResult | None:
        return next((method for method in self.methods if method.name == name), None)

    @property
    def flops(self) -> int:
        return 6 * self.n * self.d * min(self.n, self.d)

    def bytes(self, itemsize: int) -> int:
        """What any method moves: it reads both inputs twice and writes both gradients."""
        return 6 * self.n * self.d * itemsize


def run_shape(
    peers: list[Peer], n: int, d: int, settings: Settings, progress: Callable[[str], object] = print
) -> ShapeResult:
    """Everything about one shape. ``progress`` is called with a line on what happens now."""
    device, dtype = settings.device, settings.dtype
    methods = [MethodResult(peer.name) for peer in peers]
    shape = ShapeResult(n, d, None, None, *fused_choice(n, d, device), methods, [], {}, None)
    turns: dict[str, timing.Turn] = {}
    try:
        progress("float64 truth")
        z_a, z_b = accuracy.make_inputs(n, d, dtype, device)
        truth = accuracy.find_truth(z_a, z_b, 0.8 * machine.free_memory(device))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not timing.is_out_of_memory(error):
            raise
        for method in methods:
            method.failed("skipped", str(error) or "the float64 truth does not fit")
        return shape
    shape.truth, shape.truth_loss = truth.method, truth.loss
    for peer, method in zip(peers, methods, strict=True):
        progress(f"{peer.name}: check")
        try:
            loss_function = _check(peer, method, z_a, z_b, truth)
            if loss_function is not None:
                turns[peer.name], method.passes_per_turn = timing.make_turn(loss_function, z_a, z_b)
        except Exception as error:
            method.failed("out of memory" if timing.is_out_of_memory(error) else "failed", timing.describe(error))
        if settings.measure_memory and peer.name in turns:
            progress(f"{peer.name}: memory")
            try:
                if device.type == "cuda":
                    method.peak_extra_bytes = memory.cuda_peak(loss_function, z_a, z_b)
                else:
                    method.peak_extra_bytes = memory.cpu_peak(peer, n, d, dtype)
            except RuntimeError as error:
                method.memory_message = str(error)
    del truth
    if turns:
        progress("timing")
        before, bandwidths = machine.matrix_product_rates(device, dtype), machine.bandwidths(device)
        rounds = timing.interleave(turns, settings.rounds, settings.seconds)
        after = machine.matrix_product_rates(device, dtype)
        shape.orders = rounds.orders
        shape.matrix_product_rates = {name: before[name] + after[name] for name in before}
        shape.matrix_product_rate = max(max(rates) for rates in shape.matrix_product_rates.values())
        shape.bandwidths = bandwidths + machine.bandwidths(device)
        bytes_moved = shape.bytes(dtype.itemsize)
        shape.floor_s = max(bytes_moved / max(shape.bandwidths), shape.flops / shape.matrix_product_rate)
        _summarize(shape, rounds, bytes_moved)
    return shape


def _check(
    peer: Peer, method: MethodResult, z_a: torch.Tensor, z_b: torch.Tensor, truth: accuracy.Truth
) -> timing.LossFunction | None:
    """The method's loss function if it can run here and is right; else None, and ``method`` says why."""
    if peer.unavailable is not None:
        method.failed("unavailable", peer.unavailable)
        return None
    needed, free = peer.bytes_needed(*z_a.shape, z_a.itemsize), 0.9 * machine.free_memory(z_a.device)
    if needed > free:
        method.failed("skipped", f"needs {needed / 1e9:.3g} GB (predicted), {free / 1e9:.3g} GB are free")
        return None
    loss_function = peer.build()
    start = time.perf_counter()
    verdict = accuracy.check(loss_function, z_a, z_b, truth)
    method.first_pass_s = time.perf_counter() - start
    method.loss, method.loss_error, method.grad_errors = verdict.loss, verdict.loss_error, verdict.grad_errors
    if verdict.wrong is not None:
        method.failed("wrong", verdict.wrong)
        return None
    return loss_function


def _summarize(shape: ShapeResult, rounds: timing.Rounds, bytes_moved: int) -> None:
    for method in shape.methods:
        if method.name in rounds.failures:
            message = rounds.failures[method.name]
            method.failed("out of memory" if message == "out of memory" else "failed", message)
        if method.status != "timed":
            continue
        method.forward_s, method.backward_s = rounds.forward_s[method.name], rounds.backward_s[method.name]
        method.forward = timing.summarize(method.forward_s)
        method.backward = timing.summarize(method.backward_s)
        method.total = timing.summarize(rounds.total_s(method.name))
        method.flops_per_s = shape.flops / method.total.median
        method.share_of_matrix_product = method.flops_per_s / shape.matrix_product_rate
        method.bytes_per_s = bytes_moved / method.total.median
        method.share_of_floor = shape.floor_s / method.total.median
    baseline = shape.method(BASELINE)
    for method in shape.methods:
        if method.total is not None and baseline is not None and baseline.total is not None:
            own = timing.ratios(rounds.total_s(BASELINE), rounds.total_s(method.name))
            method.ratio = timing.summarize(own)


def grid_line(shape: ShapeResult) -> dict[str, Any]:
    """The line of a grid: the fused loss against the usual implementation at one shape, with a verdict.

    "faster" or "slower": the interquartile range of the rounds' ratios lies above or below 1; "even": it holds 1;
    "unsure": fewer than 5 rounds.
    """
    fused, baseline = shape.method(FUSED), shape.method(BASELINE)
    line: dict[str, Any] = {"n": shape.n, "d": shape.d, "route": shape.fused_route, "backend": shape.fused_backend}
    ratio = None if fused is None else fused.ratio
    verdict = None
    if ratio is not None:
        verdict = "faster" if ratio.q1 > 1 else "slower" if ratio.q3 < 1 else "even"
        verdict = "unsure" if len(fused.forward_s) < timing.MIN_ROUNDS else verdict
    return line | {
        "eager_s": baseline.total.median if baseline is not None and baseline.total else None,
        "fused_s": fused.total.median if fused is not None and fused.total else None,
        "ratio": None if ratio is None else dataclasses.asdict(ratio),
        "flops_per_s": None if fused is None else fused.flops_per_s,
        "share_of_matrix_product": None if fused is None else fused.share_of_matrix_product,
        "verdict": verdict,
        "messages": [f"{m.name}: {m.message}" for m in shape.methods if m.message is not None],
    }
