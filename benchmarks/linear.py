"""``python -m benchmarks --linear H``: the last linear layer and the loss, together and apart.

Each row is a way from hidden activations (N, H) and a weight (D, H) to the loss and all three gradients, the same
number by another road; they are checked against float64, timed in turn, and their memory is measured in processes of
their own:

    usual       nn.Linear and the usual implementation of the loss, with its (D, D) matrices
    separate    nn.Linear and barlow_twins_loss, with their (N, D) embeddings
    gram        linear_barlow_twins_loss: embeddings a slab at a time, two (N, N) matrices
    hidden      linear_barlow_twins_loss: no embeddings, two (H, H) matrices
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from barlow_fused import barlow_twins_loss, linear_barlow_twins_loss
from barlow_fused.planning.cost import Problem, usual_cost
from barlow_fused.planning.devices import resolve_device

from . import machine, memory, pictures, report, results
from .accuracy import TOLERANCES
from .peers import EPS, LAMBD, usual_loss

Inputs = tuple[Tensor, Tensor, Tensor]  # h_a, h_b: (N, H); weight: (D, H)
SLAB = 4096  # features of the truth's
CPU = torch.device("cpu")


def separate(h_a: Tensor, h_b: Tensor, weight: Tensor, loss: Callable = barlow_twins_loss) -> Tensor:
    """The layer, then the loss."""
    return loss(F.linear(h_a, weight), F.linear(h_b, weight))


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "usual": functools.partial(separate, loss=usual_loss),
    "separate": separate,
    "gram": functools.partial(linear_barlow_twins_loss, route="gram"),
    "hidden": functools.partial(linear_barlow_twins_loss, route="hidden"),
}
MARKS = {"usual": "o", "separate": "s", "gram": "^", "hidden": "v"}


def make(n: int, h: int, d: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Two views' rectified activations, and a weight as nn.Linear starts with it; all want gradients."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    shared = torch.randn(n, h, **options)
    views = [(shared + 0.5 * torch.randn(n, h, **options)).relu() for _ in range(2)]
    weight = (2 * torch.rand(d, h, **options) - 1) / h**0.5
    return tuple(x.to(dtype).requires_grad_() for x in (*views, weight))


def gradients(method: Callable, inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(method(*inputs), inputs)


def truth(inputs: Inputs) -> tuple[float, list[Tensor]]:
    """The loss and its gradients in float64, through (N, N) matrices, a slab of features at a time."""
    h_a, h_b, weight = (x.detach().double() for x in inputs)
    n, d = len(h_a), len(weight)

    def hats(h: Sequence[Tensor], w: Tensor) -> list[Tensor]:
        return [F.batch_norm(x @ w.T, None, None, training=True, eps=EPS) for x in h]

    slabs = [slice(start, start + SLAB) for start in range(0, d, SLAB)]
    k_a, k_b, diagonals = h_a.new_zeros(n, n), h_a.new_zeros(n, n), []
    for s in slabs:
        a, b = hats((h_a, h_b), weight[s])
        k_a += a @ a.T
        k_b += b @ b.T
        diagonals.append((a * b).mean(0))
    c = torch.cat(diagonals)
    loss = (c - 1).square().sum() + LAMBD * ((k_a * k_b).sum() / n**2 - c.square().sum())
    total, of_weight = [torch.zeros_like(h_a), torch.zeros_like(h_b)], torch.empty_like(weight)
    for s in slabs:  # <K_a, K_b> is linear in each K: its gradient is that of <K_a(slab), K_b> + <K_a, K_b(slab)>
        leaves = [x.clone().requires_grad_() for x in (h_a, h_b, weight[s])]
        a, b = hats(leaves[:2], leaves[2])
        diagonal = (a * b).mean(0)
        value = (diagonal - 1).square().sum() - LAMBD * diagonal.square().sum()
        value = value + LAMBD * ((a * (k_b @ a)).sum() + (b * (k_a @ b)).sum()) / n**2
        grads = torch.autograd.grad(value, leaves)
        total[0] += grads[0]
        total[1] += grads[1]
        of_weight[s] = grads[2]
    return loss.item(), [*total, of_weight]


def wrong(method: Callable, inputs: Inputs, exact: tuple[float, list[Tensor]]) -> tuple[list[float], str | None]:
    """The relative errors of the loss and the gradients, and what is beyond the benchmark's tolerance."""
    loss = method(*inputs)
    grads = torch.autograd.grad(loss, inputs)
    errors = [abs(loss.item() - exact[0]) / exact[0]]
    errors += [((g.double() - e).norm() / e.norm()).item() for g, e in zip(grads, exact[1], strict=True)]
    loss_tolerance, tolerance = TOLERANCES[inputs[0].dtype]
    right = errors[0] <= loss_tolerance and max(errors[1:]) <= tolerance
    return errors, None if right else f"errors {', '.join(f'{e:.1e}' for e in errors)}"


def peak(name: str, n: int, h: int, d: int, dtype: torch.dtype, threads: int) -> int:
    """Bytes of a pass beyond what goes in and comes out; in a process of its own."""
    torch.set_num_threads(threads)
    gradients(METHODS[name], make(min(n, 256), h, min(d, 1024), dtype, CPU))
    inputs = make(n, h, d, dtype, CPU)
    return memory.peak_of(lambda: gradients(METHODS[name], inputs))


def fits(name: str, n: int, d: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """None, or the bytes that the method would need, which the machine does not have."""
    if name != "usual":
        return None
    needed = usual_cost(Problem(n, d, dtype, resolve_device(device), 1, "direct")).peak_memory
    return None if needed < 0.8 * machine.free_memory(device) else needed


def measure(
    n: int, h: int, d: int, dtype: torch.dtype, device: torch.device, seconds: float, chosen: list[str]
) -> dict:
    """One shape: every method's errors, times and memory."""
    inputs = make(n, h, d, dtype, device)
    exact = truth(inputs)
    rows: dict[str, dict[str, Any]] = {}
    for name in chosen:
        needed = fits(name, n, d, dtype, device)
        rows[name] = {"needs": needed, "times": [], "errors": None, "wrong": None, "peak": None}
        if needed is None:
            rows[name]["errors"], rows[name]["wrong"] = wrong(METHODS[name], inputs, exact)
    running = [name for name in chosen if rows[name]["needs"] is None]
    start = time.perf_counter()
    while len(rows[running[0]]["times"]) < 3 or time.perf_counter() - start < seconds:
        for name in running:
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            gradients(METHODS[name], inputs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            rows[name]["times"].append(time.perf_counter() - began)
    for name in running if device.type == "cpu" else ():
        rows[name]["peak"] = memory.in_fresh_process(peak, name, n, h, d, dtype, torch.get_num_threads())
    return {"n": n, "h": h, "d": d, "methods": rows}


def table(shape: dict[str, Any]) -> Table:
    rows = shape["methods"]
    columns = Table("method", "median ms", "to separate", "memory", "loss error", "gradient error", box=None)
    base = statistics.median(rows["separate"]["times"]) if "separate" in rows else None
    for name, row in rows.items():
        if row["needs"] is not None:
            columns.add_row(name, f"needs {report._bytes(row['needs'])}")
            continue
        median = statistics.median(row["times"])
        ratio = f"{base / median:.2f}x" if base else ""
        held = "" if row["peak"] is None else report._bytes(row["peak"])
        errors = f"{row['errors'][0]:.1e}", f"{max(row['errors'][1:]):.1e}"
        columns.add_row(name, f"{1e3 * median:.1f}", ratio, held, *errors, "WRONG" if row["wrong"] else "")
    return columns


def digest(run: dict[str, Any]) -> str:
    """Of what a picture shows."""
    shown = [
        [s["n"], s["h"], s["d"], {k: [m["times"], m["peak"]] for k, m in s["methods"].items()}] for s in run["shapes"]
    ]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def markdown(run: dict[str, Any], name: str) -> str:
    """A table for docs/linear.md: a line a shape and method."""
    lines = ["| N | H | D | | ms | to separate | memory |", "|---|---|---|---|---|---|---|"]
    for shape in run["shapes"]:
        methods = shape["methods"]
        base = statistics.median(methods["separate"]["times"])
        for method, row in methods.items():
            where = f"| {shape['n']} | {shape['h']} | {shape['d']} | {method} |"
            if row["needs"] is not None:
                lines.append(f"{where} | | needs {report._bytes(row['needs'])} |")
                continue
            median = statistics.median(row["times"])
            lines.append(f"{where} {1e3 * median:.1f} | {base / median:.2f}x | {report._bytes(row['peak'])} |")
    return "\n".join(lines)


def draw(run: dict[str, Any], path: Path) -> None:
    """Time and memory against D."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    first = run["shapes"][0]
    figure.suptitle(f"The last layer and the loss: N = {first['n']}, H = {first['h']}, {run['settings']['dtype']}")
    for axes, title, value in (
        (figure.add_subplot(1, 2, 1), "forward + backward, ms", lambda r: 1e3 * statistics.median(r["times"])),
        (figure.add_subplot(1, 2, 2), "memory beyond inputs and gradients, MB", lambda r: (r["peak"] or 0) / 1e6),
    ):
        for name in first["methods"]:
            found = [(shape["d"], shape["methods"].get(name)) for shape in run["shapes"]]
            points = [(d, value(row)) for d, row in found if row and row["needs"] is None and value(row) > 0]
            axes.plot(*zip(*points, strict=True), marker=MARKS[name], label=name) if points else None
        axes.set(title=title, xlabel="D", xscale="log", yscale="log")
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, metadata={pictures.DIGEST: digest(run)})


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks --linear", description="The last linear layer and the loss, together and apart."
    )
    parser.add_argument("--linear", type=_sizes, required=True, metavar="H,...", help="hidden units")
    parser.add_argument("--n", type=_sizes, default=[256], metavar="N,...", help="samples (default: 256)")
    parser.add_argument("--d", type=_sizes, default=[8192], metavar="D,...", help="features (default: 8192)")
    parser.add_argument("--dtype", choices=[str(t).removeprefix("torch.") for t in TOLERANCES], default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peers", default=",".join(METHODS), metavar="NAME,...", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seconds", type=float, default=5.0, help="for timing a shape (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="time and memory against D")
    args = parser.parse_args(argv)
    chosen = args.peers.split(",")
    if unknown := [name for name in chosen if name not in METHODS]:
        parser.error(f"argument --peers: {unknown[0]!r} is not a method; accepted: {', '.join(METHODS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda was asked for, but PyTorch finds no CUDA GPU here")
    if min(args.n) < 2:
        parser.error("argument --n: at least 2 samples")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    run = {
        "machine": machine.describe_machine(device),
        "versions": machine.versions(),
        "git": machine.git_state(),
        "settings": {"dtype": args.dtype, "device": args.device},
        "shapes": [],
    }
    console = Console()
    failed = False
    for n, h, d in itertools.product(args.n, args.linear, args.d):
        shape = measure(n, h, d, dtype, device, args.seconds, chosen)
        run["shapes"].append(shape)
        failed |= any(row["wrong"] for row in shape["methods"].values())
        console.print(f"\nN={n} H={h} D={d}, {args.dtype}, {args.device}, forward and backward", highlight=False)
        console.print(table(shape))
        if args.json:
            results.write_json(args.json, run)
    if args.picture:
        draw(run, args.picture)
    return int(failed)


def _sizes(text: str) -> list[int]:
    sizes = [int(size) for size in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"sizes are at least 1; got {text}")
    return sizes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
