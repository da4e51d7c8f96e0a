"""A run as a picture: time against D, memory against D, and, where asked for, the roofline.

A picture's file carries a digest of the numbers that it was drawn from, by which a test tells when it is out of date.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from .peers import FUSED

METHODS = {  # those that are drawn; forced routes and backends of the fused loss are left out
    "eager": "#666666",
    "compile": "#7570b3",
    "lightly": "#a6761d",
    "solo-learn": "#e7298a",
    "fft-relaxed": "#66a61e",
    FUSED: "#d95f02",
}
MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "*": "★", "X": "✖"}  # of N, in the roofline
MANY_WIDTHS = 6  # more are named by powers of two
DIGEST = "Source"  # the field of the file


def digest(report: dict[str, Any]) -> str:
    """Of the numbers that a picture shows."""
    points = [
        [shape["n"], shape["d"], shape["floor_s"], method["name"], method["times"], method["peak_extra_bytes"]]
        for shape in report["shapes"]
        for method in shape["methods"]
    ]
    return hashlib.sha256(json.dumps(points).encode()).hexdigest()


def digest_of(path: Path) -> str | None:
    """The digest that a picture carries."""
    from PIL import Image  # matplotlib needs it

    with Image.open(path) as image:
        return image.info.get(DIGEST)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws a run in three panels, the first two at the N that has most shapes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    time, memory, roofline = figure.subplots(1, 3)
    _draw_over_d(time, memory, report)
    _draw_roofline(roofline, report)
    _finish(figure, report, path)


def draw_over_d(report: dict[str, Any], path: Path) -> None:
    """Draws the first two panels alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.9), layout="constrained")
    _draw_over_d(*figure.subplots(1, 2), report)
    _finish(figure, report, path)


def _draw_over_d(time: Any, memory: Any, report: dict[str, Any]) -> None:
    """Time and memory at the N that has most shapes."""
    n = Counter(shape["n"] for shape in report["shapes"]).most_common(1)[0][0]
    shapes = sorted((shape for shape in report["shapes"] if shape["n"] == n), key=lambda shape: shape["d"])
    for name, colour in METHODS.items():
        found = [(shape, method) for shape in shapes for method in shape["methods"] if method["name"] == name]
        timed = [(shape["d"], _seconds(method) * 1e3) for shape, method in found if _seconds(method) is not None]
        label = name + ("" if name != "fft-relaxed" else " (not the same loss)")
        if timed:
            time.plot(*zip(*timed, strict=True), color=colour, marker="o", label=label)
        held = [(shape["d"], method["peak_extra_bytes"] / 1e6) for shape, method in found if _held(method)]
        if held:
            memory.plot(*zip(*held, strict=True), color=colour, marker="o")
    floors = [(shape["d"], shape["floor_s"] * 1e3) for shape in shapes if shape["floor_s"] is not None]
    if floors:
        time.plot(*zip(*floors, strict=True), color="black", linestyle=":", label="floor, roof")
    time.set(title=f"forward + backward, N = {n}", ylabel="ms")
    memory.set(title=f"beyond inputs and gradients, N = {n}", ylabel="MB")
    widths = [shape["d"] for shape in shapes]
    for axes in (time, memory):
        axes.set(xscale="log", yscale="log", xlabel="D")
        powers = [f"$2^{{{d.bit_length() - 1}}}$" if d.bit_count() == 1 else str(d) for d in widths]
        axes.set_xticks(widths, powers if len(widths) > MANY_WIDTHS else [str(d) for d in widths])
        axes.minorticks_off()
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def _finish(figure: Any, report: dict[str, Any], path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    legend = figure.axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=len(METHODS) + 1, frameon=False)
    hardware = report["machine"]
    where = hardware["gpu"]["name"] if hardware["gpu"] else f"{hardware['cpu']}, {hardware['threads']} threads"
    figure.suptitle(f"{where}, {report['settings']['dtype']}, torch {report['versions']['torch']}", fontsize=10)
    figure.savefig(path, dpi=100, metadata={DIGEST: digest(report)} if path.suffix == ".png" else None)


def _draw_roofline(axes: Any, report: dict[str, Any]) -> None:
    """The least FLOPs that a loss needs over the least bytes, and the rate at which each method gets them done."""
    itemsize = {"float64": 8, "float32": 4}.get(report["settings"]["dtype"], 2)
    shapes = [shape for shape in report["shapes"] if shape["floor_s"] is not None]
    markers = dict(zip(sorted({shape["n"] for shape in shapes}), [*MARKERS] * len(shapes), strict=False))
    intensities = {min(shape["n"], shape["d"]) / itemsize for shape in shapes}
    for shape in shapes:
        for method in shape["methods"]:
            if method["name"] in METHODS and method["flops_per_s"] is not None:
                point = min(shape["n"], shape["d"]) / itemsize, method["flops_per_s"] / 1e9
                axes.plot(*point, color=METHODS[method["name"]], marker=markers[shape["n"]], linestyle="none")
    if shapes:
        bandwidth = max(max(shape["bandwidths"]) for shape in shapes)
        rate = max(shape["matrix_product_rate"] for shape in shapes)
        ends = sorted({min(intensities) / 2, rate / bandwidth, max(intensities) * 2, 2 * rate / bandwidth})
        axes.plot(ends, [min(rate, x * bandwidth) / 1e9 for x in ends], color="black", linestyle=":")
    key = ", ".join(f"{MARKERS[marker]} {n}" for n, marker in markers.items())
    axes.set(title="roofline", ylabel="GFLOP/s", xlabel=f"FLOPs a byte, of the least that are needed\nN: {key}")
    axes.set(xscale="log", yscale="log")


def _seconds(method: dict[str, Any]) -> float | None:
    times = method["times"].get(method["rates_of"])
    return times["total"]["median"] if times else None


def _held(method: dict[str, Any]) -> bool:
    return bool(method["peak_extra_bytes"])  # a logarithm has no place for 0
