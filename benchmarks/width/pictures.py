"""The study as pictures: accuracy over D, κ and N, and what a step costs over D.

Their files carry a digest of what they were drawn from, as the benchmark's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..pictures import DIGEST
from .points import KAPPA_WIDTHS, STUDIES
from .study import LOSSES
from .tables import METRICS, Row, baselines_of, count, rows_of

SHOWN = ("knn_few", "probe_few")
COLOURS = {"lambda": "tab:red"}  # in both panels
KEYS = ("runs", "baselines", "costs")


def digest(recorded: dict[str, Any]) -> str:
    """Of the numbers that the pictures show."""
    return hashlib.sha256(json.dumps([recorded[key] for key in KEYS]).encode()).hexdigest()


def draw(recorded: dict[str, Any], path: Path) -> None:
    """Accuracies with few labels: over D at equal κ and at equal λ, over κ, over N."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    study = recorded["study"]
    seeds = max((len(row.runs) for row in rows_of(recorded, "width")), default=0)
    figure.suptitle(
        f"{study['data']}, frozen encoder, mean and standard deviation over up to {count(seeds, 'seed')}; "
        f"N = {study['n']} except on the right"
    )
    curves = (
        ("width D", "d", {"width": "equal κ", "growing": "equal κ, hidden width grows", "lambda": "equal λ"}),
        ("κ", "kappa", {**{f"kappa-{d}": f"D = {d}" for d in KAPPA_WIDTHS}, "lambda": "equal λ, each D once"}),
        ("samples N", "n", {"samples": "D = 8192, equal κ, equally many images"}),
    )
    for row_of_axes, metric in zip(figure.subplots(2, 3, sharey="row"), SHOWN, strict=True):
        for axes, (title, field, experiments) in zip(row_of_axes, curves, strict=True):
            for number, (experiment, label) in enumerate(experiments.items()):
                rows = rows_of(recorded, experiment)
                if len(rows) > 1:
                    _curve(axes, rows, field, metric, label, COLOURS.get(experiment, f"C{number}"))
            if not axes.lines:
                axes.text(0.5, 0.5, "not run yet", transform=axes.transAxes, ha="center")
            for (name, row), style in zip(baselines_of(recorded).items(), (":", "--"), strict=True):
                axes.axhline(row.mean(metric), color="0.5", linestyle=style, label=name)
            axes.set(xscale="log", xlabel=title)
            axes.grid(alpha=0.3)
            ticks = sorted({getattr(row.point, field) for name in experiments for row in rows_of(recorded, name)})
            if ticks and field != "kappa":
                axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=30)
                axes.minorticks_off()
            axes.legend(fontsize=8)
        row_of_axes[0].set_ylabel(f"{METRICS[metric]} (%)")
    figure.savefig(path, dpi=100, metadata={DIGEST: digest(recorded)})


def draw_costs(recorded: dict[str, Any], path: Path) -> None:
    """A step's time and memory over D, of the experiment at equal κ; hollow: predicted, not run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    hardware = recorded["machine"]
    study = STUDIES[recorded["study"]["data"]]
    threads = count(hardware["threads"], "thread")
    figure.suptitle(f"A training step of the study, N = {study.n}, {hardware['cpu']}, {threads}")
    shapes = {(row.point.n, row.point.d, row.point.hidden) for row in rows_of(recorded, "width")}
    time_axes, memory_axes = figure.subplots(1, 2)
    for loss, colour in zip(LOSSES, ("tab:blue", "tab:orange"), strict=True):
        costs = [c for c in recorded["costs"] if c["loss"] == loss and (c["n"], c["d"], c["hidden"]) in shapes]
        ran = [cost for cost in costs if "seconds" in cost]
        label = "fused" if loss == "fused" else "usual (plain PyTorch)"
        time_axes.plot([c["d"] for c in ran], [c["seconds"] for c in ran], "o-", color=colour, label=label)
        peaks = [cost.get("peak_bytes", cost.get("needs_bytes")) / 1e9 for cost in costs]
        memory_axes.plot([c["d"] for c in costs], peaks, "-", color=colour)
        for cost, peak in zip(costs, peaks, strict=True):
            memory_axes.plot(cost["d"], peak, "o", color=colour, fillstyle="full" if "seconds" in cost else "none")
    widths = sorted({d for _, d, _ in shapes})
    for axes, label in ((time_axes, "seconds a step"), (memory_axes, "peak memory (GB), hollow: predicted")):
        axes.set(xlabel="width D", ylabel=label)
        if costs:
            axes.set(xscale="log", yscale="log")
        axes.set_xticks(widths, [str(d) for d in widths], rotation=30)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend()
    figure.savefig(path, dpi=100, metadata={DIGEST: digest(recorded)})


def _curve(axes: Any, rows: list[Row], field: str, metric: str, label: str, colour: str) -> None:
    x = [getattr(row.point, field) for row in rows]
    means, spreads = ([getattr(row, what)(metric) for row in rows] for what in ("mean", "spread"))
    axes.errorbar(x, means, spreads, color=colour, marker="o", capsize=3, label=label)
