"""The tables and pictures of README.md and of the pages in docs, made from the runs in benchmarks/results.

python -m benchmarks readme            # writes them
python -m benchmarks readme --check    # says whether they are up to date: exit code 0 or 1

In a document a pair of comments holds each, and names what is shown and of which runs:

    <!-- benchmarks: tables cpu-small -->
    ...
    <!-- /benchmarks -->
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import linear, pictures, report, results, trainer
from .machine import ROOT
from .width import pictures as width_pictures
from .width import tables as width_tables

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = Path(__file__).resolve().parent / "results"
PICTURES = ROOT / "docs"
BLOCK = re.compile(r"(<!-- benchmarks: (\w+) ([\w-]+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)


class Picture(NamedTuple):
    """A picture of a run: its file in docs, whose name has the run's, and how it is drawn."""

    path: str
    alt: str
    draw: Callable[[dict[str, Any], Path], None]
    digest: Callable[[dict[str, Any]], str]


PICTURES_OF = {
    "picture": Picture(
        "benchmark-{}.png", "Time against D, memory against D, roofline", pictures.draw, pictures.digest
    ),
    "over_d_picture": Picture("benchmark-{}.png", "Time and memory over D", pictures.draw_over_d, pictures.digest),
    "width_picture": Picture("{}.png", "Accuracy over D, κ and N", width_pictures.draw, width_pictures.digest),
    "width_costs_picture": Picture(
        "{}-costs.png", "Time and memory of a step over D", width_pictures.draw_costs, width_pictures.digest
    ),
    "linear_picture": Picture("{}.png", "Time and memory over D", linear.draw, linear.digest),
    "trainer_picture": Picture(
        "{}.png", "Time and memory of a training step over D, usual and fused", trainer.draw, trainer.digest
    ),
}


def render(text: str, folder: Path = RESULTS, beside: Path = PICTURES) -> str:
    """A document of the folder ``beside`` with all of its blocks made anew."""

    def block(match: re.Match) -> str:
        view, name = match[2], match[3]
        if view not in VIEWS:
            raise ValueError(f"{view!r} is not a view; accepted: {', '.join(VIEWS)}")
        shown = VIEWS[view](results.load(folder / f"{name}.json"), name)
        if view in PICTURES_OF and beside != PICTURES:
            shown = shown.replace("](", f"]({os.path.relpath(PICTURES, beside)}/")
        return f"{match[1]}{shown}\n{match[4]}"

    return BLOCK.sub(block, text)


def drawn(text: str) -> list[tuple[str, str]]:
    """The views and runs that a document shows pictures of."""
    return [(match[2], match[3]) for match in BLOCK.finditer(text) if match[2] in PICTURES_OF]


def picture_path(view: str, name: str) -> Path:
    return PICTURES / PICTURES_OF[view].path.format(name)


def headline(run: dict[str, Any], name: str) -> str:
    """The usual implementation beside the fused one, in a table that Markdown draws."""
    settings, hardware = run["settings"], run["machine"]
    where = hardware["gpu"]["name"] if hardware["gpu"] else f"{hardware['cores']} CPU cores"
    rows = [
        f"| forward + backward, {where}, {settings['dtype']} | usual | barlow_fused | ratio | memory, usual | fused |",
        "|---|---|---|---|---|---|",
    ]
    for shape in run["shapes"]:
        line = report.summary_line(shape)
        if line["ratio"] is None:
            continue
        held = {method["name"]: method["peak_extra_bytes"] for method in shape["methods"]}
        memory = (report._bytes(held.get(method)) for method in ("eager", "fused"))
        times = f"{report._ms(line['eager_s'])} ms | {report._ms(line['fused_s'])} ms"
        ratio = report._ratio(line["ratio"]["median"])
        rows.append(f"| N = {shape['n']}, D = {shape['d']} | {times} | {ratio} | {' | '.join(memory)} |")
    return "\n".join([*rows, *_busy(run)])


def summary(run: dict[str, Any], name: str) -> str:
    return _text(run, report.print_summary)


def ratios(run: dict[str, Any], name: str) -> str:
    return _text(run, report.print_ratios)


def tables(run: dict[str, Any], name: str) -> str:
    def print_all(console: Any, run: dict[str, Any]) -> None:
        report.print_run(console, run)
        console.print(f"{run['seconds']:.0f} s in all.")

    return _text(run, print_all)


def picture(run: dict[str, Any], name: str, view: str = "picture") -> str:
    hardware = run["machine"]
    where = hardware["gpu"]["name"] if hardware["gpu"] else f"{hardware['cpu']}, {hardware['cores']} cores"
    return f"![{PICTURES_OF[view].alt}: {where}, {run['settings']['dtype']}]({picture_path(view, name).name})"


def over_d_picture(run: dict[str, Any], name: str) -> str:
    return picture(run, name, "over_d_picture")


def _of_width(view: str) -> Callable[[dict[str, Any], str], str]:
    """A picture that docs/width.md shows."""
    return lambda run, name: f"![{PICTURES_OF[view].alt}, {run['study']['data']}]({picture_path(view, name).name})"


def linear_picture(run: dict[str, Any], name: str) -> str:
    return f"![{PICTURES_OF['linear_picture'].alt}]({picture_path('linear_picture', name).name})"


def trainer_table(run: dict[str, Any], name: str) -> str:
    return _text(run, lambda console, run: trainer.print_table(run, console))


def trainer_picture(run: dict[str, Any], name: str) -> str:
    alt = PICTURES_OF["trainer_picture"].alt
    return f"![{alt}: {run['machine']['cpu']}]({picture_path('trainer_picture', name).name})"


VIEWS = {
    **{function.__name__: function for function in (headline, summary, ratios, tables, picture, over_d_picture)},
    **{view: _of_width(view) for view in PICTURES_OF if view.startswith("width")},
    "linear": linear.markdown,
    "linear_picture": linear_picture,
    "trainer": trainer_table,
    "trainer_picture": trainer_picture,
    "width_lambdas": width_tables.lambdas,
    "width_settings": width_tables.settings,
    "width_findings": width_tables.findings,
    "width_kappas": width_tables.kappa_tables,
    **{f"width_{name}": width_tables.of(name) for name in ("width", "lambda", "growing", "samples")},
}


def _text(run: dict[str, Any], print_all: Any) -> str:
    return f"```text\n{report.text_of(lambda console: print_all(console, run))}\n```"


def _busy(run: dict[str, Any]) -> list[str]:
    hardware = run["machine"]
    if hardware["load"] <= hardware["cores"] / 2:
        return []
    return ["", f"(Other programs were running, load {hardware['load']:.1f} on {hardware['cores']} cores: rough.)"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say whether all is up to date")
    args = parser.parse_args(argv)
    old = []
    for document in DOCUMENTS:
        text = document.read_text()
        fresh = render(text, beside=document.parent)
        if fresh != text:
            old.append(str(document.relative_to(ROOT)))
        for view, name in drawn(fresh):
            path, run, kind = picture_path(view, name), results.load(RESULTS / f"{name}.json"), PICTURES_OF[view]
            if not path.exists() or pictures.digest_of(path) != kind.digest(run):
                old.append(str(path.relative_to(ROOT)))
                if not args.check:
                    kind.draw(run, path)
        if not args.check:
            document.write_text(fresh)
    print("\n".join(f"{'out of date' if args.check else 'written'}: {name}" for name in old) or "up to date")
    return int(args.check and bool(old))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
