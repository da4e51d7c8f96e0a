"""The study in words and Markdown tables; every number in them is the file's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from barlow_fused import suggest_lambda

from .points import BASE_D, EXPERIMENTS, KAPPA_WIDTHS, Point, Study, points
from .study import cost_of, point_of

METRICS = {
    "knn_few": "k-NN, 10 labels a class",
    "probe_few": "linear probe, 10 labels a class",
    "knn_all": "k-NN, all labels",
    "probe_all": "linear probe, all labels",
}


NOT_YET = "Not run yet."
SAID = ("knn_few", "probe_few")  # in the findings
NEARLY = 0.15  # two κ that differ less are compared


class Row(NamedTuple):
    """A point of an experiment and its runs, one a seed; the point's own seed says nothing."""

    point: Point
    runs: list[dict[str, Any]]

    def values(self, field: str) -> list[float]:
        return [run[field] for run in self.runs]

    def mean(self, field: str) -> float:
        return statistics.fmean(self.values(field))

    def spread(self, field: str) -> float:
        """The standard deviation over the seeds; 0 of a single one."""
        return statistics.stdev(self.values(field)) if len(self.runs) > 1 else 0.0


def rows_of(recorded: dict[str, Any], experiment: str) -> list[Row]:
    """The points of an experiment that were run."""
    by_point = {point_of(run): run for run in recorded["runs"]}
    seeds = sorted({run["seed"] for run in recorded["runs"]})
    wanted = points(experiment, Study(**recorded["study"]), 0)
    rows = [Row(p, [by_point[q] for seed in seeds if (q := p._replace(seed=seed)) in by_point]) for p in wanted]
    return [row for row in rows if row.runs]


def baselines_of(recorded: dict[str, Any]) -> dict[str, Row]:
    """The raw pixels and the untrained encoders, as rows."""
    point = Point(0, 0, 0, 0.0, 0)
    pixels = [baseline["pixels"] for baseline in recorded["baselines"][:1]]  # no seed changes them
    untrained = [baseline["untrained"] for baseline in recorded["baselines"]]
    return {"raw pixels": Row(point, pixels), "untrained encoder": Row(point, untrained)}


def lambdas(recorded: dict[str, Any], name: str) -> str:
    """What suggest_lambda says, for common N and D."""
    shown = (32, 128, 512, 2048, 8192)
    lines = [_line(["D", *(f"N = {n}" for n in shown)]), "|" + "---|" * (len(shown) + 1)]
    for d in (128, 512, 2048, 8192, 32768, 131072):
        lines.append(_line([str(d), *(f"{suggest_lambda(n, d):.2g}" for n in shown)]))
    return "\n".join(lines)


def settings(recorded: dict[str, Any], name: str) -> str:
    """What all runs share, in a sentence."""
    study, hardware = recorded["study"], recorded["machine"]
    seeds = sorted({run["seed"] for run in recorded["runs"]})
    where = hardware["gpu"]["name"] if hardware["gpu"] else hardware["cpu"]
    size = study["image_size"]
    return (
        f"`{study['data']}`: {study['images']} training images of {size} x {size} pixels, {study['test']} held out; "
        f"encoder and views of the preset `digits`, {study['epochs']} epochs, AdamW with a peak rate of "
        f"{study['lr'] * study['n'] / 256:g} at N = {study['n']}. {len(recorded['runs'])} runs over "
        f"{count(len(seeds), 'seed')}, {sum(run['seconds'] for run in recorded['runs']) / 3600:.1f} hours on {where}, "
        f"{count(hardware['threads'], 'thread')} a run, PyTorch {hardware['versions']['torch']}."
    )


def count(number: int, what: str) -> str:
    """1 seed, 2 seeds."""
    return f"{number} {what}{'s' * (number != 1)}"


def table(recorded: dict[str, Any], experiment: str) -> str:
    """An experiment: mean accuracy and spread over the seeds, and, where it was measured, what a step costs."""
    rows = rows_of(recorded, experiment)
    varies = "N" if experiment == "samples" else "κ" if experiment.startswith("kappa") else "D"
    fields = {
        "D": lambda row: f"{row.point.d}",
        "N": lambda row: f"{row.point.n}",
        "κ": _kappa,
        "λ": lambda row: f"{row.runs[0]['lambd']:.2g}",
        "best C_ii": lambda row: f"{row.runs[0]['c_ii_of_floor']:.2f}",
    }
    shown = [varies, *(name for name in ("κ", "λ", "best C_ii") if name != varies)]
    if experiment == "growing":
        fields["hidden"] = lambda row: f"{row.point.hidden}"
        shown.insert(1, "hidden")
    costs = varies != "κ" and any(cost_of(recorded, row.point, "fused") for row in rows)
    headings = [*shown, "seeds", *METRICS.values(), "loss / floor"]
    headings += ["step, fused", "usual", "memory, fused", "usual"] if costs else []
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for title, row in baselines_of(recorded).items():
        cells = [title, *[""] * (len(shown) - 1), str(len(row.runs)), *(cell(row, metric) for metric in METRICS)]
        lines.append(_line(cells + [""] * (len(headings) - len(cells))))
    for row in rows:
        ratio = f"{row.mean('loss') / row.mean('floor'):.3g}" if row.mean("floor") else ""
        cells = [*(fields[name](row) for name in shown), str(len(row.runs)), *(cell(row, m) for m in METRICS), ratio]
        lines.append(_line([*cells, *(_cost_cells(recorded, row.point) if costs else [])]))
    return "\n".join(lines)


def of(experiment: str) -> Callable[[dict[str, Any], str], str]:
    """The experiment's table, as a view of a document."""
    return lambda recorded, name: table(recorded, experiment) if len(rows_of(recorded, experiment)) > 1 else NOT_YET


def cell(row: Row, field: str) -> str:
    """Mean and spread."""
    spread = f" ± {row.spread(field):.1f}" if len(row.runs) > 1 else ""
    return f"{row.mean(field):.1f}{spread}"


def kappa_tables(recorded: dict[str, Any], name: str) -> str:
    """The sweeps over κ that were run, each under its width."""
    found = [d for d in KAPPA_WIDTHS if len(rows_of(recorded, f"kappa-{d}")) > 1]
    return "\n\n".join(f"D = {d}:\n\n{table(recorded, f'kappa-{d}')}" for d in found) or NOT_YET


def findings(recorded: dict[str, Any], name: str) -> str:
    """What the tables say, as a list."""
    said = []
    for metric in SAID:
        sentences = []
        for experiment in ("width", "growing"):
            rows = rows_of(recorded, experiment)
            if len(rows) > 1:
                means, noise = [row.mean(metric) for row in rows], max(row.spread(metric) for row in rows)
                sentences.append(
                    f"{EXPERIMENTS[experiment]}: {min(means):.1f} to {max(means):.1f} % from D = {rows[0].point.d} to "
                    f"{rows[-1].point.d}" + (f", with a deviation over the seeds of up to {noise:.1f}" if noise else "")
                )
        rows = rows_of(recorded, "lambda")
        if len(rows) > 1:
            listed = ", ".join(f"{row.mean(metric):.1f} at D = {row.point.d} (κ = {_kappa(row)})" for row in rows)
            sentences.append(f"{EXPERIMENTS['lambda']}: {listed}")
        rows = rows_of(recorded, "samples")
        if len(rows) > 1:
            listed = ", ".join(f"{row.mean(metric):.1f} at N = {row.point.n}" for row in rows)
            sentences.append(f"{EXPERIMENTS['samples']}: {listed}")
        if sentences:
            said.append(f"**{METRICS[metric]}**. " + ". ".join(text[0].upper() + text[1:] for text in sentences))
    pairs = [
        f"{both(row)} at D = {row.point.d} (κ = {_kappa(row)}) and {both(other)} at D = {BASE_D} (κ = {_kappa(other)})"
        for row in rows_of(recorded, "lambda")
        for other in rows_of(recorded, f"kappa-{BASE_D}")
        if row.point.d != BASE_D and abs(row.point.kappa / other.point.kappa - 1) < NEARLY
    ]
    if pairs:
        said.append(f"**Nearly the same κ at two widths**, k-NN / probe, 10 labels a class: {'; '.join(pairs)}")
    best = [_best_kappa(d, rows) for d in KAPPA_WIDTHS if len(rows := rows_of(recorded, f"kappa-{d}")) > 1]
    if best:
        said.append(f"**Best κ** of those tried, {METRICS['probe_few']}: {'; '.join(best)}")
    return "\n".join(f"- {text}." for text in said)


def both(row: Row) -> str:
    """The accuracies that the findings speak of."""
    return " / ".join(f"{row.mean(metric):.1f}" for metric in SAID)


def _best_kappa(d: int, rows: list[Row]) -> str:
    best = max(rows, key=lambda row: row.mean("probe_few"))
    close = [_kappa(row) for row in rows if row.mean("probe_few") > best.mean("probe_few") - 1]
    within = f" (within a point of that: {', '.join(close)})" if len(close) > 1 else ""
    return f"D = {d}: {best.mean('probe_few'):.1f} % at κ = {_kappa(best)}{within}"


def _kappa(row: Row) -> str:
    return f"{row.point.kappa:.3g}"


def _cost_cells(recorded: dict[str, Any], point: Point) -> list[str]:
    fused, usual = (cost_of(recorded, point, loss) for loss in ("fused", "reference"))
    times = [f"{1e3 * cost['seconds']:.0f} ms" if cost and "seconds" in cost else "-" for cost in (fused, usual)]
    return [*times, *map(_memory, (fused, usual))]


def _memory(cost: dict[str, Any] | None) -> str:
    if cost is None:
        return "-"
    return f"{cost['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in cost else f"needs {cost['needs_bytes'] / 1e9:.0f} GB"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
