"""Every Triton kernel that this GPU's tests and presets launch, compiled into Triton's cache by a pool of processes.

python -m benchmarks.precompile

One process compiles a kernel in one to two seconds, and the tests on a GPU launch about two hundred. Compiled before
they start, one process a core, these cost seconds, and no test's time is that of a compiler.

The operations run on tensors without data (benchmarks/kernels.py), and each kernel that they would have launched is
warmed up, which is Triton's word for compiling without launching.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from typing import Any, NamedTuple
from unittest import mock

import torch

from barlow_fused.backends import accelerator, why_unusable
from barlow_fused.backends.triton_kernels import configs
from barlow_fused.normalization import CONVENTIONS
from barlow_fused.verification import checks, speed

from .workers import run_jobs

PATIENCE = 60.0  # seconds of one kernel
DTYPES = ("bfloat16", "float32", "float16")
SIZES = [  # (n, d, route), those of tests/gpu
    (256, 8192, "gram"),
    (2048, 8192, "gram"),
    (1024, 65536, "gram"),
    (2048, 65536, "gram"),
    (2048, 262144, "gram"),
    (8192, 2048, "direct"),
]
MORE = [(4096, 524288, "gram"), (2048, 1024, "direct"), (64, 65536, "direct")]
SMALL = [(17, 256), (255, 4097), (1100, 2304)]  # by either route and every convention


class Call(NamedTuple):
    """A call of the loss, forward and backward."""

    n: int
    d: int
    dtype: str
    route: str
    convention: str = "batch_norm"
    precision: str = "highest"
    as_halves: bool = False  # small halves, too, are multiplied as they are


# Of tests/gpu/test_streams_gpu.py: every kernel, one phase and two, one row tile and several
KINDS = [
    Call(256, 8192, "bfloat16", "gram"),
    Call(2048, 8192, "bfloat16", "gram"),
    Call(700, 2048, "float16", "gram", "none"),
    Call(256, 2048, "float32", "gram", "std"),
    Call(1000, 2048, "float32", "gram"),
    Call(33, 1001, "bfloat16", "gram"),
    Call(2048, 1024, "bfloat16", "direct"),
    Call(300, 201, "float32", "direct", "std"),
    Call(1100, 256, "float16", "direct", "none"),
]
# Of Triton's under compute-sanitizer, tests/support/small_shapes_on_gpu.py: fewer, since it slows launches down a lot
SANITIZED = [
    Call(n, d, dtype, route, as_halves=True)
    for n, d in ((17, 100), (130, 520), (300, 77), (600, 1300))
    for dtype in ("float32", "bfloat16")
    for route in (("gram", "direct") if 2 * n <= d else ("direct",))
]


class Job(NamedTuple):
    """One of the kernels that a call launches."""

    call: Call
    index: int
    kernel: str


def calls() -> list[Call]:
    """What tests/gpu, ``barlow-fused verify`` and the presets call, those with the largest kernels first."""
    found = [Call(n, d, dtype, route) for n, d, route in (*SIZES, *MORE) for dtype in DTYPES]
    found += [
        Call(n, d, dtype, route, convention)
        for n, d in SMALL
        for convention in CONVENTIONS
        for dtype in DTYPES
        for route in ("gram", "direct")
    ]
    shapes = [(n, d, r) for n, d in checks.SHAPES for r in ("gram", "direct") if r == "gram" or d <= checks.MOST_DIRECT]
    found += [Call(n, d, dtype, route) for n, d, route in (*shapes, *speed.shapes()) for dtype in DTYPES]
    found += [*KINDS, *SANITIZED, Call(512, 4096, "float32", "gram", precision="high")]
    return list(dict.fromkeys(found))


def jobs(device: torch.device) -> list[Job]:
    """The kernels, each once."""
    found: dict[Any, Job] = {}
    for call in calls():
        for index, launch in enumerate(launches(call, device)):
            found.setdefault(launch.specialization, Job(call, index, launch.name))
    return list(found.values())


@functools.lru_cache(maxsize=256)
def launches(call: Call, device: torch.device) -> list:
    """What a call launches on that device."""
    from .kernels import launches_of

    about = accelerator.of(device)
    dtype, convention = getattr(torch, call.dtype), CONVENTIONS[call.convention]
    with mock.patch.object(configs, "FLOAT32_ELEMENTS", 0 if call.as_halves else configs.FLOAT32_ELEMENTS):
        return launches_of(about, call.n, call.d, dtype, call.route, convention, call.precision)


def compile_job(job: Job, device: torch.device | None = None) -> None:
    """In a process of the pool: into the cache, without launching."""
    launch = launches(job.call, device or torch.device("cuda", torch.cuda.current_device()))[job.index]
    launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.precompile", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, metavar="P", help="default: one a core")
    args = parser.parse_args(argv)
    gpus = accelerator.here()
    reason = why_unusable("triton", gpus[0]) if gpus else "PyTorch finds no GPU here"
    if reason is not None:
        print(f"nothing to compile: {reason}")
        return 0
    start = time.perf_counter()
    todo = jobs(gpus[0])
    failed = 0
    for count, done in enumerate(run_jobs(todo, compile_job, args.processes, PATIENCE), 1):
        if done.problem is not None:
            failed += 1
            print(f"{done.job.kernel} of {' '.join(map(str, done.job.call))}: {done.problem}", flush=True)
        if count % 20 == 0 or count == len(todo):
            print(f"{count} of {len(todo)} kernels, {time.perf_counter() - start:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
