"""Results as text of 80 columns, and as JSON.

The JSON of a run is one object. Times are in seconds, memory in bytes, rates in FLOP/s; what is not known (or is not a
finite number) is null.

    machine    cpu, architecture, cores, threads, memory_bytes, load (average, before the run), system,
               gpu {name, memory_bytes, driver, cuda}
    versions   python, torch, triton, barlow_fused, lightly
    git        commit, dirty
    started    when, in UTC
    settings   device, dtype, n, d, peers, rounds, seconds, memory, lambd, tolerances {loss, gradient}
    shapes     one object a shape: run.ShapeResult, with every method's raw round times (run.MethodResult)
    grid       one object a shape, with --grid: run.grid_line
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .peers import FUSED
from .run import MethodResult, Settings, ShapeResult

WIDTH = 80
STYLES = {"wrong": "bold red", "failed": "red", "out of memory": "yellow", "skipped": "dim", "unavailable": "dim"}
COLUMNS = (  # heading in two lines, width
    ("forward", "ms", 7),
    ("backward", "ms", 8),
    ("total", "ms", 7),
    ("", "+-", 4),
    ("vs", "eager", 6),
    ("extra", "memory", 7),
    ("", "loss", 7),
    ("grad", "error", 7),
)
RATE_COLUMNS = (("TFLOP/s", 9), ("GB/s", 8), ("of floor", 9), ("of mm", 7))
METHOD_WIDTH = WIDTH - sum(width + 1 for _, _, width in COLUMNS)
GRID_COLUMNS = (
    ("N", 5),
    ("D", 6),
    ("route", 6),
    ("eager ms", 9),
    ("fused ms", 9),
    ("ratio", 6),
    ("[q1, q3]", 14),
    ("GFLOP/s", 7),
    ("of mm", 5),
    ("", 4),
)
VERDICTS = {"faster": "", "even": "even", "slower": "SLOW", "unsure": "?", None: "-"}


def make_console() -> Console:
    return Console(width=WIDTH, highlight=False)


def print_shape(console: Console, shape: ShapeResult, settings: Settings) -> None:
    """The table of one shape, and the lines that say how to read it."""
    rounds = len(shape.orders)
    console.print(f"\n[bold]N={shape.n} D={shape.d} {name(settings)}[/bold], {rounds} rounds")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    heading = "\n".join(_columns([column[line] for column in COLUMNS]) for line in range(2))
    table.add_column("\nmethod", width=METHOD_WIDTH)
    table.add_column(Text(heading), width=WIDTH - METHOD_WIDTH - 1, overflow="fold")
    for method in shape.methods:
        style = STYLES.get(method.status, "")
        table.add_row(Text(method.name, style), Text(method.message or _numbers(method), style))
    console.print(table)
    if shape.floor_s is not None:
        _print_rates(console, shape)
    for line in _notes(shape):
        console.print(Text(line))


def _print_rates(console: Console, shape: ShapeResult) -> None:
    """What each method achieved, beside what this machine could."""
    floor = f"{'rates':{METHOD_WIDTH}}" + "".join(heading.rjust(width) for heading, width in RATE_COLUMNS)
    console.print(Text(f"\n{floor}\n{'─' * len(floor)}"))
    for method in shape.methods:
        if method.total is not None:
            cells = (
                _three(method.flops_per_s / 1e12),
                _three(method.bytes_per_s / 1e9),
                _percent(method.share_of_floor),
                _percent(method.share_of_matrix_product),
            )
            text = "".join(cell.rjust(width) for cell, (_, width) in zip(cells, RATE_COLUMNS, strict=True))
            console.print(Text(f"{method.name:{METHOD_WIDTH}}{text}"))
    machine = f"copy {max(shape.bandwidths) / 1e9:.4g} GB/s, product {_gflops(shape.matrix_product_rate)} GFLOP/s"
    console.print(
        Text(
            "On 6 N D min(N, D) FLOPs and 6 N D numbers moved, the least that any method needs. Floor:"
            f" {_ms(shape.floor_s)} ms, the slower of both at this machine's rates in this run ({machine}). of mm: the"
            " share of that product."
        )
    )


def _numbers(method: MethodResult) -> str:
    memory = "-" if method.peak_extra_bytes is None else _bytes(method.peak_extra_bytes)
    return _columns(
        [
            _ms(method.forward.median),
            _ms(method.backward.median),
            _ms(method.total.median),
            _percent(method.total.spread),
            "-" if method.ratio is None else _ratio(method.ratio.median),
            memory,
            _significant(method.loss),
            f"{max(method.grad_errors):.1e}",
        ]
    )


def _columns(cells: list[str]) -> str:
    return " ".join(cell.rjust(width) for cell, (_, _, width) in zip(cells, COLUMNS, strict=True))


def _notes(shape: ShapeResult) -> list[str]:
    """Paragraphs: the console breaks them into lines."""
    if shape.truth is None:
        return []
    notes = [
        "Times: medians of the rounds; +-: interquartile range of the total. vs eager: eager's total / the method's,"
        " median of the rounds' own ratios. Extra memory: peak beyond inputs and gradients. Error: against float64"
        f" ({shape.truth})."
    ]
    for method in shape.methods:
        if method.name == "compile" and method.first_pass_s is not None:
            notes.append(f"compile: the first pass took {method.first_pass_s:.1f} s, compilation included.")
        if method.memory_message is not None:
            notes.append(f"{method.name}: memory not measured: {method.memory_message}")
    fused = shape.method(FUSED)
    if fused is not None and fused.flops_per_s is not None:
        rates = ", ".join(f"{routine} {_gflops(max(r))}" for routine, r in shape.matrix_product_rates.items())
        notes.append(
            f"fused ({shape.fused_route}, {shape.fused_backend}): {_gflops(fused.flops_per_s)} GFLOP/s on"
            f" 6 N D min(N, D), {_percent(fused.share_of_matrix_product)} of this machine's best matrix product in"
            f" this run ({rates} GFLOP/s)."
        )
    return notes


def print_grid_heading(console: Console, settings: Settings) -> None:
    console.print(f"\n[bold]{name(settings)}: ratio = eager's total time / fused's[/bold]")
    console.print(Text(_grid_columns([heading for heading, _ in GRID_COLUMNS])))
    console.print("─" * WIDTH)


def print_grid_line(console: Console, line: dict[str, Any]) -> None:
    ratio = line["ratio"]
    if ratio is None:
        cells = [line["n"], line["d"], line["route"], *(_ms(line[key]) for key in ("eager_s", "fused_s"))]
        console.print(Text(_grid_columns([*map(str, cells), *[""] * (len(GRID_COLUMNS) - len(cells))]).rstrip()))
    else:
        quartiles = f"[{ratio['q1']:.3g}, {ratio['q3']:.3g}]"
        cells = [
            str(line["n"]),
            str(line["d"]),
            line["route"],
            _ms(line["eager_s"]),
            _ms(line["fused_s"]),
            _ratio(ratio["median"]),
            quartiles,
            _gflops(line["flops_per_s"]),
            _percent(line["share_of_matrix_product"]),
            VERDICTS[line["verdict"]],
        ]
        console.print(Text(_grid_columns(cells), "bold red" if line["verdict"] == "slower" else ""))
    for message in line["messages"]:
        console.print(Text(f"      {message}", "yellow"))


def print_grid(console: Console, lines: list[dict[str, Any]]) -> None:
    """The ratios over N x D at a glance."""
    counts = {verdict: sum(line["verdict"] == verdict for line in lines) for verdict in VERDICTS}
    widths = sorted({line["d"] for line in lines})
    ratio = {(line["n"], line["d"]): line["ratio"] for line in lines}
    console.print("\n[bold]ratio[/bold]" + "".join(f"D={d}".rjust(11) for d in widths))
    for n in sorted({line["n"] for line in lines}):
        cells = (ratio.get((n, d)) for d in widths)
        console.print(Text(f"N={n}".ljust(5) + "".join(_ratio(c["median"] if c else None).rjust(11) for c in cells)))
    console.print(
        f"{counts['faster']} shapes faster, {counts['even']} even (the quartiles hold 1), {counts['slower']} slower,"
        f" {counts['unsure']} unsure (fewer than 5 rounds), {counts[None]} not measured. GFLOP/s: on 6 N D min(N, D);"
        " of mm: their share of the best matrix product in the same run."
    )


def _grid_columns(cells: list[str]) -> str:
    return " ".join(cell.rjust(width) for cell, (_, width) in zip(cells, GRID_COLUMNS, strict=True))


def name(settings: Settings) -> str:
    return f"{_dtype(settings)} on {settings.device.type}"


def _dtype(settings: Settings) -> str:
    return str(settings.dtype).removeprefix("torch.")


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    ms = seconds * 1e3
    return f"{ms:.{0 if ms >= 99.95 else 1 if ms >= 9.995 else 2 if ms >= 0.9995 else 3}f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.{2 if ratio < 9.995 else 1 if ratio < 99.95 else 0}f}x"


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction < 9.995 else ">10x"


def _three(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _gflops(rate: float) -> str:
    return f"{rate / 1e9:.{1 if rate < 1e10 else 0}f}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.{1 if count < 1e7 else 0}f} MB"


def _significant(value: float) -> str:
    text = f"{value:.6g}"
    return text if len(text) <= 7 else f"{value:.1e}"


def to_json(
    settings: Settings,
    asked: dict[str, Any],
    origin: dict[str, Any],  # machine, versions, git, started
    shapes: list[ShapeResult],
    grid: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """All of a run."""
    report = {**origin, "settings": asked, "shapes": [dataclasses.asdict(shape) for shape in shapes]}
    if grid is not None:
        report["grid"] = grid
    return _finite(report)


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
