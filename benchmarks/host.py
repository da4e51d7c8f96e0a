"""``python -m benchmarks host``: what a call costs the processor that launches it, with nothing launched.

At N = 256, D = 8192 a GPU needs about 30 us, so Python decides how long an eager call takes. Everything that happens
on the host is done here, forward and backward, on CPU tensors: allocations, arguments, autograd. Nothing is launched:
the CUDA extension's functions and Triton's kernels are replaced by nothing, and leave their outputs as they are.
PyTorch's own operators, in the usual implementation and in the torch backend's shape for accelerators, get inputs of 4
x 16 numbers, on which they compute next to nothing. Methods take turns, so that they share the machine's moods.

A second table says where the time of the kernels' backends goes. ``autograd`` is a ``torch.autograd.Function`` with the
same tensors that does nothing: what PyTorch takes by itself for recording a call, ``loss.backward()`` and handing over
two gradients, less its allocations. Launches are their preparation: a GPU's driver adds 1 to 3 us each, and
Triton's launcher, which needs a driver, 5 to 8.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import cProfile
import ctypes
import importlib.util
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from barlow_fused import BarlowTwinsLoss, backends, function
from barlow_fused import loss as loss_module
from barlow_fused.backends import accelerator, cuda_backend

from .peers import usual_loss

CALLS = 50  # a turn
KERNELS = (
    *("normalize_kernel", "moments_kernel", "apply_moments_kernel", "gram_kernel"),
    *("correlate_kernel", "correlate_terms_kernel", "gram_grad_kernel", "direct_grad_kernel"),
    *("grad_product_kernel", "grad_apply_kernel"),
)


def _nothing(*_: object, **__: object) -> None:
    return None


class _Silent:
    """In the place of a Triton kernel, and of what it is compiled to."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return self._launch

    def _launch(self, *_: object, **__: object) -> _Silent:
        return self


# In the place of the CUDA extension. Its plans are made once a shape, so any numbers will do.
_PLAN = SimpleNamespace(slabs=128, chunks=1, block=64, split=4, steps=32, tiles=10, partials=2**17)
_SEQUENCE = SimpleNamespace(
    **dict.fromkeys(("normalize", "gram", "correlate", "gram_grad", "direct_grad", "launch"), _nothing)
)
_EXTENSION = SimpleNamespace(
    emulated=True,
    warm_up=_nothing,
    Sequence=lambda *_: _SEQUENCE,
    **dict.fromkeys(("plan_normalize", "plan_gram", "plan_correlate"), lambda *_: _PLAN),
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
            from barlow_fused.backends import triton_backend, triton_launch

            for name in KERNELS:
                silent = _Silent(getattr(triton_backend, name))
                stack.enter_context(mock.patch.object(triton_backend, name, silent))
            stack.enter_context(mock.patch.object(triton_launch, "can_launch", return_value=True))
            stack.enter_context(mock.patch.object(accelerator, "of", return_value=accelerator.named("sm_90")))
            triton_backend.forget()
            stack.callback(triton_backend.forget)
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
        begin = time.thread_time()
        for _ in range(calls):
            self.loss(z_a, z_b).backward()
            z_a.grad = z_b.grad = None
        return (time.thread_time() - begin) / calls


def measure(methods: dict[str, Method], turns: int) -> dict[str, list[float]]:
    """Seconds of each method in each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(-1, turns):  # the first warms up
        for name, method in methods.items():
            taken = method(CALLS)
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


class _Autograd(torch.autograd.Function):
    """Saves and returns what the loss does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, z_a: torch.Tensor, z_b: torch.Tensor, saved: torch.Tensor) -> tuple[torch.Tensor]:
        ctx.save_for_backward(z_a, z_b, saved)
        ctx.set_materialize_grads(False)
        return (z_a.new_empty((), dtype=torch.float32),)

    @staticmethod
    def backward(ctx: Any, g_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z_a, z_b, _ = ctx.saved_tensors
        return torch.empty_like(z_a), torch.empty_like(z_b), None


def _autograd_alone() -> Callable:
    saved = torch.empty(1, dtype=torch.uint8)
    return lambda z_a, z_b: _Autograd.apply(z_a, z_b, saved)[0]


# What a call's parts are made of: (where, name)
PARTS = {
    "checks": [(loss_module, f) for f in ("check_group_options", "check_inputs", "finite", "resolve_normalization")],
    "choice": [
        *((loss_module, f) for f in ("choose_backend", "choose_route")),
        *((function, f) for f in ("resolve_backend", "_passes")),
    ],
    "allocations": [(torch.Tensor, "new_empty"), (torch, "empty_like")],
}


class _Clock:
    """Seconds in functions, less those in the functions that these call."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self._inside = [0.0]
        for _ in range(1000):
            self.wrap("clock", _nothing)()
        self._own = self.seconds.pop("clock") / 1000  # what measuring adds to a function

    def wrap(self, part: str, f: Callable) -> Callable:
        def timed(*args: object, **kwargs: object) -> object:
            self._inside.append(0.0)
            begin = time.thread_time()
            result = f(*args, **kwargs)
            spent = time.thread_time() - begin
            self.seconds[part] += spent - self._inside.pop() - getattr(self, "_own", 0.0)
            self._inside[-1] += spent
            return result

        return timed


def breakdown(name: str, method: Method, autograd: Method, turns: int) -> dict[str, float]:
    """Seconds of a call in each of its parts, of a backend of kernels; of autograd only what its allocations take off.

    Medians of turns.
    """
    backend = backends.load(name, torch.device("cpu"))
    recorder, passes = backend.OPERATIONS.recorder, backend._passes
    with contextlib.ExitStack() as stack:
        clock = _Clock()
        backend.forget()
        stack.callback(backend.forget)
        recorded = recorder.launches
        launches = lambda self: clock.wrap("launches", recorded(self))  # noqa: E731
        for owner, attribute, replacement in (
            (recorder, "launches", launches),
            *(
                (passes, plan, clock.wrap("plan", getattr(passes, plan)))
                for plan in ("_forward_plan", "_backward_plan")
            ),
            *((o, f, clock.wrap(part, getattr(o, f))) for part, functions in PARTS.items() for o, f in functions),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, replacement))
        method(CALLS)  # records plans
        seen: dict[str, list[float]] = collections.defaultdict(list)
        for _ in range(turns):
            clock.seconds.clear()
            method(CALLS)
            for part, spent in clock.seconds.items():
                seen[part].append(spent / CALLS)
            clock.seconds.clear()
            autograd(CALLS)
            seen["autograd"].append(-clock.seconds["allocations"] / CALLS)
    return {part: statistics.median(seconds) for part, seconds in seen.items()}


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
    _keep_memory()
    with _as_on_a_gpu() as usable:
        methods = {"usual": Method(usual_loss, 4, 16, dtype)}
        for name in usable:
            n, d = shapes.get(name, (arguments.n, arguments.d))
            methods[name] = Method(BarlowTwinsLoss(backend=name), n, d, dtype)
        methods["autograd"] = Method(_autograd_alone(), arguments.n, arguments.d, dtype)
        seconds = measure(methods, arguments.turns)
        alone = methods["autograd"]
        parts = {name: breakdown(name, methods[name], alone, arguments.turns) for name in usable if name != "torch"}
        if arguments.profile:
            profile(methods[arguments.profile])
    table = Table(title=f"host time in us, N={arguments.n} D={arguments.d} {arguments.dtype}")
    for heading in ("method", "median", "quartiles", "of usual"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, times in seconds.items():
        low, median, high = statistics.quantiles([1e6 * t for t in times], n=4, method="inclusive")
        ratio = statistics.median(t / u for t, u in zip(times, seconds["usual"], strict=True))
        table.add_row(name, f"{median:.0f}", f"{low:.0f} to {high:.0f}", f"{ratio:.2f}")
    console.print(table)
    console.print(_parts_table(parts, seconds))
    return 0


def _parts_table(parts: dict[str, dict[str, float]], seconds: dict[str, list[float]]) -> Table:
    table = Table("part", title="where it goes, in us")
    alone = statistics.median(seconds["autograd"])
    for name, of_method in parts.items():
        of_method["autograd"] += alone
        of_method["between them"] = statistics.median(seconds[name]) - sum(of_method.values())
        table.add_column(name, justify="right")
    for part in ("autograd", *PARTS, "plan", "launches", "between them"):
        table.add_row(part, *(f"{1e6 * of_method[part]:.1f}" for of_method in parts.values()))
    return table


def _keep_memory() -> None:
    """Have the C library keep what was freed, as PyTorch's allocator for GPUs does."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
