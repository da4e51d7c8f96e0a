"""``python -m benchmarks host``: what a call costs the processor that launches it, with nothing launched.

At N = 256, D = 8192 a GPU needs about 30 us, so Python decides how long an eager call takes. Everything that happens
on the host is done here, forward and backward, on CPU tensors: allocations, arguments, autograd. Nothing is launched:
the CUDA extension's functions and Triton's kernels are replaced by nothing, and leave their outputs as they are.
PyTorch's own operators, in the usual implementation and in the torch backend's shape for accelerators, get inputs of 4
x 16 numbers, on which they compute next to nothing. Methods take turns, so that they share the machine's moods.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import importlib.util
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from barlow_fused import BarlowTwinsLoss, backends
from barlow_fused.backends import cuda_backend

from .peers import usual_loss

CALLS = 50  # a turn
KERNELS = (
    *("normalize_kernel", "moments_kernel", "apply_moments_kernel", "gram_kernel"),
    *("correlate_kernel", "correlate_terms_kernel", "gram_grad_kernel", "direct_grad_kernel"),
)


def _nothing(*_: object, **__: object) -> None:
    return None


class _Silent:
    """In the place of a Triton kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return _nothing


# In the place of the CUDA extension. Its plans are made once a shape, so any numbers will do.
_PLAN = SimpleNamespace(slabs=128, chunks=1, block=64, split=4, steps=32, tiles=10, partials=2**17)
_EXTENSION = SimpleNamespace(
    emulated=True,
    **dict.fromkeys(("plan_normalize", "plan_gram", "plan_correlate"), lambda *_: _PLAN),
    **dict.fromkeys(("normalize", "gram", "correlate", "gram_grad", "direct_grad"), _nothing),
)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[list[str]]:
    """In this block the backends run on CPU tensors as on a GPU's, and launch nothing; the list has their names."""
    usable = ["torch", "cuda"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "why_unusable", _nothing))
        load = backends.load
        whole = torch.device("meta")
        stack.enter_context(mock.patch.object(backends, "load", lambda name, device: load(name, whole)))
        cuda_backend.use(_EXTENSION)
        stack.callback(cuda_backend.use, None)
        if importlib.util.find_spec("triton") is not None:
            from barlow_fused.backends import triton_backend
            from barlow_fused.backends.triton_kernels import configs

            for name in KERNELS:
                stack.enter_context(mock.patch.object(triton_backend, name, _Silent()))
            for name, value in (("architecture", 90), ("multiprocessors", 132), ("has_tma", True)):
                stack.enter_context(mock.patch.object(configs, name, return_value=value))
            usable.append("triton")
        yield usable


class Method:
    """A loss, and the inputs that it is called with."""

    def __init__(self, loss: Callable, n: int, d: int, dtype: torch.dtype) -> None:
        self.loss = loss
        self.z = [torch.zeros(n, d, dtype=dtype, requires_grad=True) for _ in range(2)]

    def __call__(self, calls: int) -> float:
        """Seconds of a forward and backward pass, a mean over so many."""
        z_a, z_b = self.z
        begin = time.perf_counter()
        for _ in range(calls):
            self.loss(z_a, z_b).backward()
            z_a.grad = z_b.grad = None
        return (time.perf_counter() - begin) / calls


def measure(methods: dict[str, Method], turns: int) -> dict[str, list[float]]:
    """Seconds of each method in each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(-1, turns):  # the first warms up
        for name, method in methods.items():
            taken = method(CALLS)
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def profile(method: Method, lines: int = 25) -> None:
    """Print where a method's time goes."""
    profiler = cProfile.Profile()
    profiler.enable()
    method(20 * CALLS)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m benchmarks host", description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=256, help="samples (default: 256)")
    parser.add_argument("--d", type=int, default=8192, help="features (default: 8192)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--turns", type=int, default=30, help=f"of {CALLS} calls (default: 30)")
    parser.add_argument("--profile", metavar="METHOD", help="also print where this method's time goes")
    arguments = parser.parse_args(argv)
    dtype = getattr(torch, arguments.dtype)
    console = Console()
    shapes = {"torch": (4, 16)}
    torch.set_num_threads(1)
    with _as_on_a_gpu() as usable:
        methods = {"usual": Method(usual_loss, 4, 16, dtype)}
        for name in usable:
            n, d = shapes.get(name, (arguments.n, arguments.d))
            methods[name] = Method(BarlowTwinsLoss(backend=name), n, d, dtype)
        seconds = measure(methods, arguments.turns)
        if arguments.profile:
            profile(methods[arguments.profile])
    table = Table(title=f"host time in us, N={arguments.n} D={arguments.d} {arguments.dtype}")
    for heading in ("method", "median", "quartiles", "of usual"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, times in seconds.items():
        low, median, high = statistics.quantiles([1e6 * t for t in times], n=4)
        ratio = statistics.median(t / u for t, u in zip(times, seconds["usual"], strict=True))
        table.add_row(name, f"{median:.0f}", f"{low:.0f} to {high:.0f}", f"{ratio:.2f}")
    console.print(table)
    return 0
