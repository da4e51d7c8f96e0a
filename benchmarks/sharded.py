"""A training step with the projector's last layer in shards, as ``plan`` predicts it: docs/sharded.png.

python -m benchmarks.sharded
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from barlow_fused.planning.step import MEMORY, StepPlan, step_plan

RANKS = (8, 64, 512, 4096)
WIDTHS = [2**k for k in range(13, 21)]
COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a")
N, HIDDEN = 4096, 8192


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser("python -m benchmarks.sharded", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="docs/sharded.png")
    parser.add_argument("--device", default="h200", choices=sorted(MEMORY))
    arguments = parser.parse_args(argv)
    plans = {
        ranks: [step_plan(N, f"{HIDDEN}-{HIDDEN}-{d}", torch.bfloat16, arguments.device, ranks) for d in WIDTHS]
        for ranks in RANKS
    }
    _draw(plans, arguments)
    print(arguments.out)
    return 0


def _draw(plans: dict[int, list[StepPlan]], arguments: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    panels = (("memory", "memory of each rank (GB)", 1e9), ("step", "a step, without the backbone (seconds)", 1.0))
    for axes, (field, title, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for colour, (ranks, row) in zip(COLOURS, plans.items(), strict=True):
            for name, style, label in (("data_parallel", "--", "data parallel"), ("sharded", "-", "in shards")):
                values = [getattr(getattr(p, name), field) / unit for p in row]
                axes.plot(WIDTHS, values, style, color=colour, label=f"P = {ranks}, {label}", marker=".")
        if field == "memory":
            axes.axhline(MEMORY[arguments.device] / unit, color="black", linewidth=0.8)
            axes.annotate(
                f"{MEMORY[arguments.device] / unit:.0f} GB", (WIDTHS[0], MEMORY[arguments.device] / unit * 1.1)
            )
        axes.set(xscale="log", yscale="log", xlabel="features D", title=title)
        axes.set_xticks(WIDTHS[::2], [f"$2^{{{d.bit_length() - 1}}}$" for d in WIDTHS[::2]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    first = plans[RANKS[0]][0]
    figure.suptitle(
        f"Predicted, not measured: N = {N}, projector {HIDDEN}-{HIDDEN}-D, bfloat16, {first.optimizer}, {first.device}",
        fontsize=10,
    )
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
