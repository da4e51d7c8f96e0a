"""What a run prints: the progress of training and, at the end, what was gained."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from .evaluate import FEW, Accuracy


class Output:
    """A stream to print on, whose reader may leave (``train ... | head``): what comes after is dropped, which is said.

    Training goes on; everything is in the run's folder.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._open = stream, True

    def write(self, text: str) -> int:
        """Returns how many characters were taken: all, also where nobody reads them."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Of the stream."""
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        if not self._open:
            return
        try:
            act()
        except BrokenPipeError:
            self._open = False
            with contextlib.suppress(OSError, ValueError):  # or Python fails once more as it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            print("Nobody reads what is printed any more; the run goes on.", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


LINES = 10  # in a log that is not a terminal


class Progress:
    """A progress bar in a terminal; elsewhere (a log file, CI) about LINES plain lines."""

    def __init__(self, console: Console, first: int, total: int, what: str = "step") -> None:
        self.console, self.what = console, what
        self.total = total
        self.lines = first * LINES // total  # printed so far
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        self.bar = RichProgress(*columns, console=console, disable=not console.is_terminal, expand=True)
        self.task = self.bar.add_task("", total=total, completed=first)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, step: int, metrics: dict[str, Any] | None, memory: int = 0) -> None:
        """After each step; ``metrics`` when they were logged, ``memory`` the most bytes of GPU memory in use so far."""
        if metrics is None:
            self.bar.update(self.task, completed=step)
            return
        text = "loss {loss:.4g} on {on_diag:.4g} off {off_diag:.2e} {images_per_second:.0f} img/s".format(**metrics)
        if memory:
            text += f" {memory / 1e9:.1f} GB"
        self.show(step, text)

    def show(self, step: int, text: str) -> None:
        """Step ``step`` is done, and ``text`` is to be said about it."""
        self.bar.update(self.task, completed=step, description=text)
        if not self.console.is_terminal and step * LINES // self.total > self.lines:
            self.lines = step * LINES // self.total
            self.console.print(f"{self.what} {step}/{self.total}  {text}", highlight=False, soft_wrap=True)


def print_gain(console: Console, results: dict[str, Accuracy], labelled: int, test: int) -> None:
    """The closing table: accuracies of each representation, the last one's gain over the one before it."""
    title = f"Accuracy (%) on {test} held-out images, of at most {labelled} labels"
    table = Table(title=title, title_justify="left")
    table.add_column("frozen representation")
    for heading in (f"k-NN\n{FEW} a class", f"linear probe\n{FEW} a class", "k-NN\nall labels"):
        table.add_column(heading, justify="right")
    *others, (name, after) = results.items()
    for other, before in others:
        table.add_row(other.replace("_", " "), *_format(before, "{:.1f}"))
    table.add_row(name.replace("_", " "), *_format(after, "{:.1f}"), style="bold", end_section=True)
    gain = [None if None in pair else pair[1] - pair[0] for pair in zip(before, after, strict=True)]
    table.add_row("gain of pretraining", *_format(gain, "{:+.1f}"))
    console.print(table)


def _format(values: Sequence[float | None], pattern: str) -> list[str]:
    return ["-" if value is None else pattern.format(value) for value in values]
