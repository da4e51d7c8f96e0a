"""How a step scales with the ranks, as ``plan`` predicts it: docs/scaling.png.

python -m benchmarks.scaling
python -m benchmarks.scaling --out scaling.png --n-per-rank 32
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from barlow_fused.planning.network import Network
from barlow_fused.planning.plan import Plan, plan

RANKS = [2**k for k in range(1, 13)]
WIDTHS = (8192, 65536, 1048576)
COLOURS = ("#1b9e77", "#d95f02", "#7570b3")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="docs/scaling.png")
    parser.add_argument("--device", default="h200")
    parser.add_argument("--n", type=int, default=4096, help="samples of all ranks (default: 4096)")
    parser.add_argument("--n-per-rank", type=int, metavar="N", help="samples of each rank, instead of --n")
    arguments = parser.parse_args(argv)

    def made(d: int, ranks: int) -> Plan:
        n = arguments.n_per_rank * ranks if arguments.n_per_rank else arguments.n
        return plan(n, d, torch.bfloat16, device=arguments.device, world_size=ranks)

    _draw({d: [made(d, ranks) for ranks in RANKS] for d in WIDTHS}, arguments)
    print(arguments.out)
    return 0


def _draw(plans: dict[int, list[Plan]], arguments: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    net = Network()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = (
        ("step", "forward + backward of the loss (seconds)", 1.0),
        ("sent_bytes", "bytes sent by each rank (GB)", 1e9),
        ("peak_memory", "memory of each rank, beyond inputs\nand gradients (GB)", 1e9),
    )
    for axes, (field, title, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        for colour, (d, row) in zip(COLOURS, plans.items(), strict=True):
            for name, style in (("usual", "--"), ("fused", "-")):
                values = [getattr(getattr(p, name), field) / unit for p in row]
                label = f"D = {d}, {'usual' if name == 'usual' else 'barlow_fused'}"
                axes.plot(RANKS, values, style, color=colour, label=label, marker=".")
        axes.set(xscale="log", yscale="log", xlabel="ranks P", title=title)
        axes.set_xticks([2, 8, 64, 512, 4096], ["2", "8", "64", "512", "4096"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    per_rank = arguments.n_per_rank
    n = f"N = {per_rank} P" if per_rank else f"N = {arguments.n}"
    figure.suptitle(
        f"Predicted, not measured: {n}, bfloat16, {plans[WIDTHS[0]][0].device}, {net.ranks_per_node} a node, "
        f"{net.intra / 1e9:.0f} GB/s in it, {net.inter / 1e9:.0f} GB/s out, latency {net.latency * 1e6:.0f} µs",
        fontsize=10,
    )
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
