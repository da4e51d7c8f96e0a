"""``python -m benchmarks contention``: the loss on a CPU that other programs use, too.

Shared nodes, data-loader workers and two runs on one machine are ordinary. The usual implementation spends its time in
few long operators, ours in many short ones, at whose ends threads wait for one another. Each row is a process that runs
both, interleaved, under one load and one setting of how OpenMP's threads wait (``barlow_fused/waiting.py``).

A part of the usual implementation's time are page faults: its (D, D) matrices are returned to the operating system
after each call and fetched again. One row has an allocator that keeps what it got.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from barlow_fused import barlow_twins_loss
from barlow_fused.waiting import SETTINGS

from . import machine, results
from .inputs import make_inputs
from .peers import usual_loss

ONE = [sys.executable, "-m", "benchmarks.contention", "--one"]
LOADS = {  # what runs beside it
    "nothing": None,
    "a busy loop": [sys.executable, "-c", "while True: pass"],
    "a second copy": [*ONE, "--rounds", "1000000"],
}
WAITING = {"PyTorch's default": {}, "short (our commands)": SETTINGS}
KEEPS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(2**28)}  # glibc's malloc
MORE_FUSED = 5  # calls for one of the usual implementation


def measure(n: int, d: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of both, forward and backward, round by round."""
    z = make_inputs(n, d, torch.float32, torch.device("cpu"))

    def seconds(loss_function: Any) -> float:
        start = time.perf_counter()
        torch.autograd.grad(loss_function(*z), z)
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"usual": [], "fused": []}
    seconds(usual_loss)
    seconds(barlow_twins_loss)
    for _ in range(rounds):
        times["usual"].append(1e3 * seconds(usual_loss))
        times["fused"].append(1e3 * statistics.median(seconds(barlow_twins_loss) for _ in range(MORE_FUSED)))
    return times


@contextlib.contextmanager
def beside(command: list[str] | None, environment: dict[str, str]) -> Iterator[None]:
    """A program runs during the block."""
    if command is None:
        yield
        return
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def rows(n: int, d: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One condition after the other: load, waiting, allocator, and both times' medians."""
    clean = {name: value for name, value in os.environ.items() if name not in {*SETTINGS, *KEEPS}}
    shape = ["--n", str(n), "--d", str(d)]
    conditions = [(load, waiting, {}) for load in LOADS for waiting in WAITING]
    conditions.insert(2, ("nothing", "PyTorch's default", KEEPS))
    for load, waiting, allocator in conditions:
        environment = {**clean, **WAITING[waiting], **allocator}
        with beside(LOADS[load] and [*LOADS[load], *(shape if load == "a second copy" else [])], environment):
            done = subprocess.run(
                [*ONE, *shape, "--rounds", str(rounds)], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
        times = json.loads(done.stdout)
        ratios = [usual / fused for usual, fused in zip(times["usual"], times["fused"], strict=True)]
        yield {
            "beside": load,
            "waiting": waiting,
            "memory_kept": bool(allocator),
            "usual_ms": statistics.median(times["usual"]),
            "fused_ms": statistics.median(times["fused"]),
            "ratio": statistics.median(ratios),
            "smallest_ratio": min(ratios),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks contention", description="The loss on a CPU that other programs use, too."
    )
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--d", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5, help="of both, for each row (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a row's process
    args = parser.parse_args(argv)
    if min(args.n - 1, args.d, args.rounds) < 1:
        parser.error("--n must be at least 2, --d and --rounds at least 1")
    if args.one:
        print(json.dumps(measure(args.n, args.d, args.rounds)))
        return 0
    about = machine.describe_machine(torch.device("cpu"))
    console = Console()
    console.print(f"N={args.n} D={args.d}, float32, forward and backward, ms", highlight=False)
    table = Table("beside", "threads wait", "memory", "usual", "fused", "ratio", "least", box=None)
    found = []
    for row in rows(args.n, args.d, args.rounds):
        found.append(row)
        numbers = (f"{row['usual_ms']:.0f}", f"{row['fused_ms']:.1f}", f"{row['ratio']:.1f}x")
        kept = "kept" if row["memory_kept"] else ""
        table.add_row(row["beside"], row["waiting"], kept, *numbers, f"{row['smallest_ratio']:.1f}x")
    console.print(table)
    if args.json:
        results.write_json(args.json, {"machine": about, "n": args.n, "d": args.d, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
