"""What the width of the projector costs a training step: ``python -m benchmarks.trainer``.

The digits preset's step (views, network, loss, backward, AdamW; N = 128, projector 512-D) for each D, with
``--loss reference`` and ``--loss fused``, each in a process of its own: the fastest of the steps after a few to warm up
(the one that other programs disturbed least), and the process's peak memory (of a GPU: its tensors'). What would
not fit is predicted instead of run: the loss's peak (``barlow_fused.plan``), weights, gradients and AdamW's moments,
and the rest of the process.

It writes ``benchmarks/results/trainer-<device>.json``; ``--json FILE`` prints a recorded one, and
``--picture FILE`` draws it.
``python -m benchmarks readme`` makes the README's picture and docs/training.md's table of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from barlow_fused import plan
from barlow_fused.train import model, optim, trainer
from barlow_fused.train.config import Config, combine
from barlow_fused.train.loader import Parts
from barlow_fused.train.processes import Processes
from barlow_fused.train.step import Stepper, criterion

from . import machine, pictures

LOSSES = ("reference", "fused")
WIDTHS = [2**k for k in range(10, 17)]  # 1024 ... 65536
WARM_UP = 2
ALONE = Processes(0, 0, 1)
SHARE = 0.6  # of the free memory that a run may take: other programs need some too
RESULTS = Path(__file__).parent / "results"


def measure(asked: Config, steps: int) -> dict[str, float]:
    """Seconds of a step and peak bytes, in this process."""
    images = trainer.load_images(asked, ALONE)
    config = trainer.resolve(asked, images, ALONE)
    place = torch.device(config.device)
    network, _ = trainer.build(config, images, place)
    scaler = torch.amp.GradScaler(config.device, enabled=False)
    stepper = Stepper(
        network, criterion(config, ALONE, network), optim.build(network, config), scaler, config, place, 0
    )
    parts = Parts(images, config, ALONE)
    network.train()
    seconds = []
    for step in range(WARM_UP + steps):
        start = time.perf_counter()
        stepper.backward([parts[step]], step).loss.item()
        stepper.update()
        if place.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = (
        torch.cuda.max_memory_allocated()
        if place.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {"seconds": min(seconds[WARM_UP:]), "peak_bytes": peak}


def predicted(loss: str, d: int, base: float, device: str) -> float:
    """Peak bytes: the process without a projector (``base``), weights with gradients and moments, the loss."""
    n = combine({}).batch_size
    weights = sum(p.numel() for p in model.build("tiny", 1, 16, [512, d]).parameters())
    backend = "reference" if loss == "reference" else "torch"
    return base + 4 * 4 * weights + plan(n, d, device=device, backend=backend).fused.peak_memory


def run(widths: list[int], steps: int, device: str, console: Console) -> dict[str, Any]:
    """Every width with both losses; the rows of the table, and the machine."""
    rows: list[dict[str, Any]] = []
    base = 0.0
    for d in widths:
        for loss in LOSSES:
            need = predicted(loss, d, base, device)
            row: dict[str, Any] = {"loss": loss, "d": d, "predicted_bytes": need}
            if need < SHARE * machine.free_memory(torch.device(device)):
                command = [sys.executable, "-m", "benchmarks.trainer", "--one", loss, str(d), "--steps", str(steps)]
                done = subprocess.run([*command, "--device", device], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{loss} D = {d} failed:\n{done.stderr[-2000:]}")
                row |= json.loads(done.stdout)
                base = base or row["peak_bytes"] - need
            rows.append(row)
            console.print(describe(row), highlight=False)
    hardware = machine.describe_machine(torch.device(device))
    return {"machine": hardware, "versions": machine.versions(), "git": machine.git_state(), "rows": rows}


def describe(row: dict[str, Any]) -> str:
    """A row in words."""
    if "seconds" not in row:
        return f"{row['loss']} D = {row['d']}: not run, needs {row['predicted_bytes'] / 1e9:.0f} GB"
    return f"{row['loss']} D = {row['d']}: {1e3 * row['seconds']:.0f} ms a step, {row['peak_bytes'] / 1e9:.2f} GB"


def print_table(report: dict[str, Any], console: Console) -> None:
    """Both losses side by side."""
    hardware = report["machine"]
    console.print(
        f"A training step of the digits preset, N = 128, projector 512-D, float32, on {hardware['cpu']}, "
        f"{hardware['threads']} threads (load average {hardware['load']:.1f})."
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("D", "reference", "fused", "ratio", "reference", "fused"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_shape = {(row["d"], row["loss"]): row for row in report["rows"]}
    for d in dict.fromkeys(row["d"] for row in report["rows"]):
        reference, fused = (by_shape[d, loss] for loss in LOSSES)
        times = [f"{1e3 * row['seconds']:.0f} ms" if "seconds" in row else "-" for row in (reference, fused)]
        peaks = [
            f"{row['peak_bytes'] / 1e9:.2f} GB" if "seconds" in row else f"needs {row['predicted_bytes'] / 1e9:.0f} GB"
            for row in (reference, fused)
        ]
        both = "seconds" in reference and "seconds" in fused
        ratio = f"{reference['seconds'] / fused['seconds']:.1f}x" if both else "-"
        table.add_row(str(d), *times, ratio, *peaks)
    console.print(table)


def digest(report: dict[str, Any]) -> str:
    """Of what a picture shows."""
    return hashlib.sha256(json.dumps([report["machine"], report["rows"]]).encode()).hexdigest()


def draw(report: dict[str, Any], path: Path) -> None:
    """Step time and peak memory over D; hollow where predicted."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    hardware = report["machine"]
    figure.suptitle(f"A training step, N = 128, float32, {hardware['cpu']}, {hardware['threads']} threads")
    time_axes, memory_axes = figure.subplots(1, 2)
    for loss, label, color in (("reference", "usual loss", "tab:orange"), ("fused", "barlow_fused", "tab:blue")):
        rows = [row for row in report["rows"] if row["loss"] == loss]
        ran = [row for row in rows if "seconds" in row]
        time_axes.plot([r["d"] for r in ran], [r["seconds"] for r in ran], "o-", color=color, label=label)
        peaks = [row.get("peak_bytes", row["predicted_bytes"]) / 1e9 for row in rows]
        memory_axes.plot([r["d"] for r in rows], peaks, "-", color=color)
        for row, peak in zip(rows, peaks, strict=True):
            memory_axes.plot(row["d"], peak, "o", color=color, fillstyle="full" if "seconds" in row else "none")
    widths = list(dict.fromkeys(row["d"] for row in report["rows"]))
    for axes, label in ((time_axes, "seconds a step"), (memory_axes, "peak memory, GB (hollow: predicted)")):
        axes.set(xscale="log", yscale="log", xlabel="width of the projector, D", ylabel=label)
        axes.set_xticks(widths, [str(d) for d in widths], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend(loc="upper left")
    figure.savefig(path, dpi=110, metadata={pictures.DIGEST: digest(report)} if path.suffix == ".png" else None)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.trainer", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="timed steps (default: 8)")
    parser.add_argument("--d", type=lambda text: [int(d) for d in text.split(",")], default=WIDTHS, metavar="D,...")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="print this record instead of measuring")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="step time and peak memory over D")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # LOSS D: in a process of its own
    arguments = parser.parse_args()
    device = trainer.choose_device(arguments.device)
    if arguments.one:
        loss, d = arguments.one
        asked = combine({"loss": loss, "projector": f"512-{d}", "device": device})
        print(json.dumps(measure(asked, arguments.steps)))
        return
    console = Console(width=80, highlight=False)
    path = arguments.json or arguments.out / f"trainer-{device}.json"
    if arguments.json:
        report = json.loads(path.read_text())
    else:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        report = run(arguments.d, arguments.steps, device, console)
        path.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report, console)
    if arguments.picture:
        draw(report, arguments.picture)
    console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    main()
