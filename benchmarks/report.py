"""A run as text of 80 columns. Everything is printed from what the JSON has (results.py), fresh or recorded."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .peers import BASELINE, FUSED
from .timing import MIN_ROUNDS

WIDTH = 80
METHOD_WIDTH = 19
STYLES = {"wrong": "bold red", "failed": "red", "out of memory": "yellow", "skipped": "dim", "unavailable": "dim"}
SUMMARY_COLUMNS = (
    *(("N", 5), ("D", 6), ("route", 6), ("eager ms", 8), ("fused ms", 8), ("ratio", 6), ("[q1, q3]", 14)),
    *(("of floor", 8), ("", 5)),
)
VERDICTS = {"faster": "", "even": "even", "slower": "SLOW", "unsure": "?", None: "-"}

Column = tuple[str, str, int, Callable[[dict[str, Any]], str]]  # heading in two lines, width, a method's cell


def make_console(**options: Any) -> Console:
    return Console(width=WIDTH, highlight=False, **options)


def plain_table(*columns: tuple[str, int]) -> Table:
    """Of headings and widths; numbers stand on the right."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, (heading, width) in enumerate(columns):
        table.add_column(heading, width=width, justify="right" if i else "left", no_wrap=True)
    return table


def text_of(print_all: Callable[[Console], None]) -> str:
    """What a function prints, as plain text."""
    console = make_console(color_system=None, force_terminal=False)
    with console.capture() as capture:
        print_all(console)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").splitlines())


def print_title(console: Console, report: dict[str, Any]) -> None:
    """Where and when."""
    hardware, versions, git = report["machine"], report["versions"], report["git"]
    gpu = "" if hardware["gpu"] is None else f"{hardware['gpu']['name']}, driver {hardware['gpu']['driver']}, "
    commit = (git["commit"] or "unknown")[:10] + ("+" if git["dirty"] else "")
    console.print(
        f"{gpu}{hardware['cpu']}, {hardware['threads']} threads. barlow_fused {versions['barlow_fused']} ({commit}), "
        f"torch {versions['torch']}."
    )
    if hardware["load"] > hardware["cores"] / 2:
        console.print(
            f"[yellow]Other programs were running (load average {hardware['load']:.1f} on {hardware['cores']} cores):"
            " times are wrong, and ratios are rough.[/yellow]"
        )


def print_run(console: Console, report: dict[str, Any]) -> None:
    """All of a recorded run."""
    print_title(console, report)
    for shape in report["shapes"]:
        print_shape(console, shape, report["settings"])
    print_legend(console, report)


def print_shape(console: Console, shape: dict[str, Any], settings: dict[str, Any]) -> None:
    """The two tables of one shape: times, and what else there is to know."""
    sets = f", {shape['input_sets']} input sets" if shape["input_sets"] else ""
    title = f"N={shape['n']} D={shape['d']} {settings['dtype']} on {settings['device']}"
    console.print(f"\n[bold]{title}[/bold], {shape['rounds']} rounds{sets}")
    _print_table(console, shape, _time_columns(settings["modes"]), messages=True)
    if any(method["status"] == "timed" for method in shape["methods"]):
        console.print()
        _print_table(console, shape, _other_columns(settings["device"]), messages=False)
    if shape["floor_s"] is not None:
        console.print(
            Text(
                f"Floor {_ms(shape['floor_s'])} ms, of a copy at {_three(max(shape['bandwidths']), 1e-9)} GB/s and a"
                f" product at {_three(shape['matrix_product_rate'], 1e-9)} GFLOP/s; fused: {shape['fused_route']}"
                f" {shape['fused_backend']}."
            )
        )
    for note in _notes(shape):
        console.print(Text(note))


def _print_table(console: Console, shape: dict[str, Any], columns: list[Column], messages: bool) -> None:
    """A method a line; in the place of its numbers the reason why there are none."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    headings = (" ".join(column[line].rjust(column[2]) for column in columns) for line in range(2))
    table.add_column("\nmethod", width=METHOD_WIDTH)
    table.add_column(Text("\n".join(headings)), width=WIDTH - METHOD_WIDTH - 1, overflow="fold")
    for method in shape["methods"]:
        style = STYLES.get(method["status"], "")
        name = method["name"] + ("" if method["same_loss"] else " *")
        if method["status"] == "timed":
            cells = " ".join(cell(method).rjust(width) for _, _, width, cell in columns)
        elif messages:
            cells = method["message"]
        else:
            continue
        table.add_row(Text(name, style), Text(cells, style))
    console.print(table)


def _time_columns(modes: list[str]) -> list[Column]:
    columns: list[Column] = []
    if "launches" in modes:
        columns += [
            ("forward", "ms", 7, lambda method: _part(method, "launches", "forward")),
            ("backward", "ms", 8, lambda method: _part(method, "launches", "backward")),
            ("total", "ms", 7, lambda method: _median(method, "launches")),
            ("", "+-", 4, _spread),
            ("vs", "eager", 6, lambda method: _mode_ratio(method, "launches")),
        ]
    if "graph" in modes:
        columns += [
            ("graph", "ms", 7, lambda method: _median(method, "graph")),
            ("vs", "eager", 6, lambda method: _mode_ratio(method, "graph")),
        ]
    if "forward" in modes:
        columns.append(("loss", "only ms", 7, lambda method: _median(method, "forward")))
    return columns


def _other_columns(device: str) -> list[Column]:
    rate, unit = ("TFLOP/s", 1e-12) if device == "cuda" else ("GFLOP/s", 1e-9)
    return [
        ("extra", "memory", 8, lambda method: _bytes(method["peak_extra_bytes"])),
        *([("launches", "a call", 8, lambda method: str(method["launches"]))] if device == "cuda" else []),
        ("", rate, 7, lambda method: _three(method["flops_per_s"], unit)),
        ("", "GB/s", 6, lambda method: _three(method["bytes_per_s"], 1e-9)),
        ("of", "floor", 6, lambda method: _percent(method["share_of_floor"])),
        ("", "loss", 8, lambda method: _significant(method["loss"])),
        ("gradient", "error", 8, lambda method: f"{max(method['grad_errors']):.1e}"),
    ]


def _notes(shape: dict[str, Any]) -> list[str]:
    notes = []
    for method in shape["methods"]:
        if method["name"] == "compile" and method["first_pass_s"] is not None:
            notes.append(f"compile: the first call took {method['first_pass_s']:.1f} s, compilation included.")
        if method["memory_message"] is not None:
            notes.append(f"{method['name']}: memory not measured: {method['memory_message']}")
        for mode, times in method["times"].items():
            if times["message"] is not None:
                notes.append(f"{method['name']}, {mode}: {times['message']}")
    return notes


def print_legend(console: Console, report: dict[str, Any]) -> None:
    """How to read the tables, once."""
    modes, shapes = report["settings"]["modes"], report["shapes"]
    truths = " or ".join(sorted({shape["truth"] for shape in shapes if shape["truth"]})) or "none"
    sentences = [
        "Medians of interleaved rounds; +-: interquartile range of the total. vs eager: eager's time / the method's,",
        "median of the rounds' own ratios.",
        *(["graph: forward and backward replayed from a CUDA graph."] if "graph" in modes else []),
        *(["loss only: forward without gradients."] if "forward" in modes else []),
        "Extra memory: peak beyond inputs and gradients. FLOP/s and GB/s: of 6 N D min(N, D) FLOPs and 6 N D numbers,",
        "the least that any method needs; floor: the slower of both at the machine's rates, measured before and after.",
        f"Gradient error: against float64 ({truths}).",
    ]
    if any(not method["same_loss"] for shape in shapes for method in shape["methods"]):
        sentences.append("*: not the same loss; its error is against its own float64 formula.")
    console.print()
    console.print(Text(" ".join(sentences)))


# -- one line a shape --


def summary_line(shape: dict[str, Any]) -> dict[str, Any]:
    """The fused loss against the usual implementation, in the mode that rates are of, with a verdict.

    "faster" or "slower": the interquartile range of the rounds' ratios lies above or below 1; "even": it holds 1;
    "unsure": fewer than 5 rounds; None: one of them was not timed.
    """
    methods = {method["name"]: method for method in shape["methods"]}
    fused, baseline = methods.get(FUSED), methods.get(BASELINE)
    mode = fused and fused["rates_of"]
    times, eager = (method and method["times"].get(mode) for method in (fused, baseline))
    line = {
        "fused_s": times["total"]["median"] if times else None,
        "eager_s": eager["total"]["median"] if eager and eager["total"] else None,
        "eager_message": baseline and baseline["message"],
        "ratio": times["ratio"] if times else None,
        "share_of_floor": fused and fused["share_of_floor"],
        "verdict": None,
    }
    if line["ratio"] is not None:
        q1, q3 = line["ratio"]["q1"], line["ratio"]["q3"]
        verdict = "faster" if q1 > 1 else "slower" if q3 < 1 else "even"
        line["verdict"] = "unsure" if shape["rounds"] < MIN_ROUNDS else verdict
    return line


def print_summary(console: Console, report: dict[str, Any]) -> None:
    """One line a shape, and the ratios over N and D at a glance where the shapes form a grid."""
    settings = report["settings"]
    console.print(f"\n[bold]{settings['dtype']} on {settings['device']}: ratio = eager's time / fused's[/bold]")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for heading, width in SUMMARY_COLUMNS:
        table.add_column(heading, width=width, justify="right", no_wrap=True)
    lines = [summary_line(shape) for shape in report["shapes"]]
    for shape, line in zip(report["shapes"], lines, strict=True):
        ratio = line["ratio"]
        message = line["eager_message"] or "-"
        cells = (
            *(str(shape["n"]), str(shape["d"]), shape["fused_route"]),
            *(_ms(line["eager_s"]), _ms(line["fused_s"]), _ratio(ratio and ratio["median"])),
            # a shape that eager cannot do says why here
            f"[{ratio['q1']:.3g}, {ratio['q3']:.3g}]" if ratio else message if len(message) <= 14 else "-",
            *(_percent(line["share_of_floor"]), VERDICTS[line["verdict"]]),
        )
        table.add_row(*(Text(cell) for cell in cells), style="bold red" if line["verdict"] == "slower" else "")
    console.print(table)
    counts = {verdict: sum(line["verdict"] == verdict for line in lines) for verdict in VERDICTS}
    console.print(
        f"{counts['faster']} shapes faster, {counts['even']} even (the quartiles hold 1), {counts['slower']} slower,"
        f" {counts['unsure']} unsure (fewer than 5 rounds), {counts[None]} without a ratio."
    )


def print_ratios(console: Console, report: dict[str, Any]) -> None:
    """The ratios over N and D at a glance."""
    ratios = {(shape["n"], shape["d"]): summary_line(shape)["ratio"] for shape in report["shapes"]}
    rows, columns = (sorted({shape[axis] for shape in ratios}) for axis in (0, 1))
    table = plain_table(("ratio", 7), *((f"D={d}", 10) for d in columns))
    for n in rows:
        found = (ratios.get((n, d)) for d in columns)
        table.add_row(f"N={n}", *(_ratio(ratio["median"] if ratio else None) for ratio in found))
    console.print(table)


# -- cells --


def _part(method: dict[str, Any], mode: str, part: str) -> str:
    times = method["times"].get(mode)
    return _ms(statistics.median(times["parts_s"][part]) if times and times["total"] else None)


def _median(method: dict[str, Any], mode: str) -> str:
    times = method["times"].get(mode)
    return _ms(times["total"]["median"] if times and times["total"] else None)


def _spread(method: dict[str, Any]) -> str:
    total = method["times"]["launches"]["total"]
    return _percent((total["q3"] - total["q1"]) / total["median"])


def _mode_ratio(method: dict[str, Any], mode: str) -> str:
    times = method["times"].get(mode)
    return _ratio(times["ratio"]["median"] if times and times["ratio"] else None)


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    ms = seconds * 1e3
    return f"{ms:.{0 if ms >= 99.95 else 1 if ms >= 9.995 else 2 if ms >= 0.9995 else 3}f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.{2 if ratio < 9.995 else 1 if ratio < 99.95 else 0}f}x"


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return "-"
    return f"{fraction:.{1 if fraction < 0.00995 else 0}%}" if fraction < 9.995 else ">10x"


def _three(value: float | None, unit: float) -> str:
    if value is None:
        return "-"
    value *= unit
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _bytes(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.{1 if count < 1e7 else 0}f} MB"


def _significant(value: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}"
    return text if len(text) <= 7 else f"{value:.1e}"
