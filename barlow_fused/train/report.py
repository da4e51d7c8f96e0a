"""What a run prints: the progress of training and, at the end, what was gained."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from .evaluate import FEW, Accuracy

LINES = 10  # in a log that is not a terminal


class Progress:
    """A progress bar in a terminal; elsewhere (a log file, CI) about LINES plain lines."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.lines = 0  # printed so far
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        self.bar = RichProgress(*columns, console=console, disable=not console.is_terminal, expand=True)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, step: int, metrics: dict[str, Any] | None) -> None:
        """After each step; ``metrics`` when they were logged."""
        if metrics is None:
            self.bar.update(self.task, completed=step)
            return
        text = "loss {loss:.4g} on {on_diag:.4g} off {off_diag:.2e} {images_per_second:.0f} img/s".format(**metrics)
        self.bar.update(self.task, completed=step, description=text)
        if not self.console.is_terminal and step * LINES // self.total > self.lines:
            self.lines = step * LINES // self.total
            self.console.print(f"step {step}/{self.total}  {text}", highlight=False, soft_wrap=True)


def print_gain(console: Console, pixels: Accuracy, before: Accuracy, after: Accuracy, train: int, test: int) -> None:
    """The closing table: accuracies before and after pretraining, and their difference."""
    title = f"Accuracy (%) on {test} held-out images, from {FEW} labels a class or all {train} labels"
    table = Table(title=title, title_justify="left")
    table.add_column("frozen representation")
    for labels in (f"{FEW} a class", "all labels"):
        for method in ("k-NN", "linear probe"):
            table.add_column(f"{method}\n{labels}", justify="right")
    table.add_row("raw pixels", *_format(pixels, "{:.1f}"))
    table.add_row("untrained encoder", *_format(before, "{:.1f}"))
    table.add_row("pretrained encoder", *_format(after, "{:.1f}"), style="bold", end_section=True)
    gain = [b - a for a, b in zip(before, after, strict=True)]
    table.add_row("gain of pretraining", *_format(gain, "{:+.1f}"))
    console.print(table)


def _format(values: Any, pattern: str) -> list[str]:
    return [pattern.format(value) for value in values]
