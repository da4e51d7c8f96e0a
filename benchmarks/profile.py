"""Where one call's time goes, and how many launches it makes, from torch.profiler.

python -m benchmarks profile --n 256 --d 8192
python -m benchmarks profile --n 256 --d 8192 --device cuda --backend triton --trace trace.json

The processor's time is split into

    Python       everything outside PyTorch's operators: the loss's own Python, autograd
    dispatch     operators that only allocate, make views or call an operator that computes; on GPUs all operators, for
                 there the computing is the kernels' business
    launches     calls of the CUDA driver (on GPUs)
    operators    the rest: on CPUs they do the computing, so each has a line of its own

and, on GPUs, the device's time into its kernels, copies and fills, and what it waits.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity

from . import inputs
from .accuracy import TOLERANCES, gradients
from .peers import LossFunction, choose_peers

CALLS = 20
LINES = 12  # of operators or kernels
ARRANGE = re.compile(  # operators that touch no numbers
    r"aten::(_?(un)?(empty|view|reshape|as_strided|slice|select|transpose|expand|detach|squeeze|unsqueeze|permute|"
    r"narrow|alias|resize|set|diagonal|unbind|split|lift_fresh|to|t|T|expect\w*)(_\w*)?|item|_local_scalar_dense|resolve_conj|resolve_neg|result_type|promote_types)$"
)
HELPERS = {  # operators that those that compute call on the way
    *("aten::contiguous", "aten::clone", "aten::copy_", "aten::fill_", "aten::zero_", "aten::zeros", "aten::ones"),
}


@dataclasses.dataclass
class Part:
    """A part of a call: what, how often, how long."""

    name: str
    count: float = 0.0  # of a call
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class CallProfile:
    """The mean of some calls."""

    seconds: float  # by the clock, without the profiler
    profiled_seconds: float  # with it
    processor: list[Part]  # together profiled_seconds
    kernels: list[Part]  # on a GPU


def count_launches(loss_function: LossFunction, z_a: Tensor, z_b: Tensor) -> int:
    """Kernels, copies and fills that one call, forward and backward, puts on the GPU."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        gradients(loss_function(z_a, z_b), z_a, z_b)
        torch.cuda.synchronize()
    return sum(1 for event in profiler.events() if _on_gpu(event))


def profile_call(
    call: Callable[[], object], device: torch.device, calls: int = CALLS, trace: Path | None = None
) -> CallProfile:
    """Profiles a call that has been made before; ``trace`` is a file for chrome://tracing or ui.perfetto.dev."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    seconds = _seconds(call, device, calls)
    with torch.profiler.profile(activities=activities):  # the first profile sets things up
        call()
    with torch.profiler.profile(activities=activities) as profiler:
        profiled_seconds = _seconds(call, device, calls)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    kernels = _add_up(((event.name, event.time_range.elapsed_us()) for event in events if _on_gpu(event)), calls)
    processor = _add_up(
        (
            (_part_of(event, device), event.self_cpu_time_total)
            for event in events
            if not _on_gpu(event) and _part_of(event, device) is not None
        ),
        calls,
    )
    inside = sum(part.seconds for part in processor)
    processor.append(Part("Python, autograd", 1, max(0.0, profiled_seconds - inside)))
    return CallProfile(seconds, profiled_seconds, sorted(processor, key=lambda part: -part.seconds), kernels)


def _on_gpu(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation


def _part_of(event: Any, device: torch.device) -> str | None:
    """The part of the processor's time that an event belongs to; None: Python's."""
    if re.match(r"cu(da)?[A-Z]", event.name):
        return "launches (CUDA driver)"
    if "::" not in event.name or event.name.startswith("autograd::"):
        return None
    calls_others = any(not ARRANGE.match(child.name) and child.name not in HELPERS for child in event.cpu_children)
    return "dispatch" if device.type == "cuda" or ARRANGE.match(event.name) or calls_others else event.name


def _add_up(timed: Iterable[tuple[str, float]], calls: int) -> list[Part]:
    """Parts from names and microseconds, the longest first."""
    parts: dict[str, Part] = collections.defaultdict(lambda: Part(""))
    for name, microseconds in timed:
        part = parts[name]
        part.name = name
        part.count += 1 / calls
        part.seconds += microseconds / 1e6 / calls
    return sorted(parts.values(), key=lambda part: -part.seconds)


def _seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Of a call, by the clock."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - start) / calls


def main(argv: list[str]) -> int:
    from .report import make_console

    parser = argparse.ArgumentParser("python -m benchmarks profile", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=256, help="samples (default: 256)")
    parser.add_argument("--d", type=int, default=8192, help="features (default: 8192)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=[str(dtype)[6:] for dtype in TOLERANCES], help="default: as in a run")
    parser.add_argument("--peer", default="fused-auto", help="a method (default: fused-auto)")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"that are averaged (default: {CALLS})")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev there")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda was asked for, but PyTorch finds no CUDA GPU here")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if min(args.n, args.d, args.calls + 1) < 2:
        parser.error("arguments --n, --d: at least 2; --calls: at least 1")
    try:
        (peer,) = choose_peers([args.peer], device)
    except ValueError as error:
        parser.error(f"argument --peer: {error}")
    z = inputs.make_inputs(args.n, args.d, dtype, device)
    loss_function = peer.build()

    def call() -> None:
        gradients(loss_function(*z), *z)

    for _ in range(3):
        call()
    found = profile_call(call, device, args.calls, args.trace)
    console = make_console()
    console.print(
        f"{peer.name}: N={args.n} D={args.d} {str(dtype)[6:]} on {device.type}, forward and backward:"
        f" [bold]{found.seconds * 1e6:.0f} µs[/bold] a call ({found.profiled_seconds * 1e6:.0f} µs under the profiler,"
        f" which the shares are of)"
    )
    console.print(_table("processor", found.processor, found.profiled_seconds))
    if device.type == "cuda":
        busy = sum(part.seconds for part in found.kernels)
        waiting = Part("(GPU waits)", 0, max(0.0, found.profiled_seconds - busy))
        console.print(_table("GPU", [waiting, *found.kernels], found.profiled_seconds))
    return 0


def _table(title: str, parts: list[Part], seconds: float) -> Table:
    from .report import plain_table

    table = plain_table((title, 44), ("times a call", 12), ("µs a call", 10), ("share", 6))
    shown, rest = parts[:LINES], parts[LINES:]
    if rest:
        shown = [*shown, Part(f"{len(rest)} others", sum(p.count for p in rest), sum(p.seconds for p in rest))]
    for part in shown:
        cells = f"{part.count:.3g}", f"{part.seconds * 1e6:.1f}", f"{part.seconds / seconds:.0%}"
        table.add_row(part.name[:44], *cells)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
