"""The study as it stands: a file of one data set's runs, and the loop that adds those that are missing.

``benchmarks/results/width-<data>.json`` is one object:

    study      the settings that all runs share (points.Study)
    machine    what they ran on, threads a run, versions
    baselines  by seed: the accuracies of raw pixels and of the untrained encoder
    runs       one object a point: n, d, hidden, kappa, seed; accuracies in percent; the mean loss, on_diag and off_diag
               of the last steps; lambd, floor, c_ii_of_floor; rank (effective, of the representation); steps, seconds
    costs      one object a shape and loss: a step's seconds and the process's peak bytes, or what they would need

A file is replaced after every run, whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from barlow_fused import plan

from .. import machine, results
from ..trainer import SHARE
from .points import KAPPA, STUDIES, Point

RESULTS = Path(__file__).resolve().parents[1] / "results"
RUNS = Path("runs") / "width"  # the runs under way
LOSSES = ("fused", "reference")  # in this order: what the second needs is told from the first


class StudyError(Exception):
    """The study cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Launcher:
    """How a run is started: in a process of its own, after the words of ``before``."""

    before: tuple[str, ...] = ()  # such as nice -n 19
    threads: int = 1
    runs: Path = RUNS

    def answer(self, recorded: dict[str, Any], what: str, point: Point, **more: Any) -> dict[str, Any]:
        """What one.py leaves in the result.json of a folder of its own, which is removed then.

        Raises:
            StudyError: the process failed; its folder stays, and it goes on from there the next time.
        """
        name = "-".join([recorded["study"]["data"], what, point.name, *more.values()])
        folder = self.runs / name
        request = {"what": what, "study": recorded["study"], "point": point, **more}
        text = json.dumps({**request, "folder": str(folder), "threads": self.threads})
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [*self.before, sys.executable, "-m", "benchmarks.width.one", text]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        with _passed_on(process):
            _, errors = process.communicate()
        if process.returncode:
            last = (errors.strip().splitlines() or ["it said nothing"])[-1]
            raise StudyError(f"{name} ended with {process.returncode}: {last}. The study goes on from here next time")
        result = json.loads((folder / "result.json").read_text())
        shutil.rmtree(folder)
        return result


@contextmanager
def _passed_on(process: subprocess.Popen) -> Iterator[None]:
    """In its block a signal to stop goes to the run, which writes its state and ends."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        os.killpg(process.pid, signal.SIGTERM)

    previous = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def path_of(data: str, folder: Path = RESULTS) -> Path:
    """The file of a data set's runs."""
    return folder / f"width-{data}.json"


def read(data: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What there is of a data set's study; a new one if there is no file.

    Raises:
        StudyError: its runs had other settings than they would have now.
    """
    path, settings = path_of(data, folder), dataclasses.asdict(STUDIES[data])
    if not path.exists():
        return {"study": settings, "machine": {}, "baselines": [], "runs": [], "costs": []}
    recorded = results.load(path)
    if recorded["study"] != settings:
        raise StudyError(f"{path} has runs with other settings: {recorded['study']}, now {settings}. Move it away")
    return recorded


def write(recorded: dict[str, Any], folder: Path = RESULTS) -> None:
    """Replace the file."""
    path = path_of(recorded["study"]["data"], folder)
    temporary = path.with_suffix(".tmp")
    results.write_json(temporary, recorded)
    temporary.replace(path)


def point_of(run: dict[str, Any]) -> Point:
    """The point of a recorded run."""
    return Point(*(run[field] for field in Point._fields))


def missing(recorded: dict[str, Any], wanted: list[Point]) -> list[Point]:
    """The points that were not run yet."""
    done = {point_of(run) for run in recorded["runs"]}
    return [point for point in wanted if point not in done]


def add_runs(
    recorded: dict[str, Any], wanted: list[Point], launcher: Launcher, folder: Path, say: Callable[[str], None]
) -> None:
    """Run what is missing, one process after the other, the baselines of the seeds first."""
    data = recorded["study"]["data"]
    known = {baseline["seed"] for baseline in recorded["baselines"]}
    for point in {point.seed: point for point in wanted if point.seed not in known}.values():
        answer = launcher.answer(recorded, "baselines", point)
        recorded["baselines"].append({"seed": point.seed, **answer})
        write(recorded, folder)
        say(f"{data} seed {point.seed}: baselines")
    todo = missing(recorded, wanted)
    for number, point in enumerate(todo, 1):
        answer = launcher.answer(recorded, "pretrain", point)
        recorded["runs"].append({**point._asdict(), **answer})
        recorded["machine"] = described(launcher.threads)
        write(recorded, folder)
        say(
            f"{number}/{len(todo)} {data} {point.name}: {answer['knn_few']:.1f} {answer['probe_few']:.1f} "
            f"{answer['knn_all']:.1f} {answer['probe_all']:.1f}, loss {answer['loss']:.4g} of floor "
            f"{answer['floor']:.4g}, {answer['seconds']:.0f} s"
        )


def add_costs(
    recorded: dict[str, Any], wanted: list[Point], launcher: Launcher, folder: Path, say: Callable[[str], None]
) -> None:
    """Measure a step of every shape with both losses; of what would not fit, the bytes that it needs are predicted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for point in sorted({point._replace(kappa=KAPPA, seed=0) for point in wanted}):
        for loss in LOSSES:
            if cost_of(recorded, point, loss):
                continue
            needs = 0
            if loss == "reference":
                needs = cost_of(recorded, point, "fused")["peak_bytes"] + _more_than_fused(point, device)
            if needs > SHARE * machine.free_memory(device):
                cost = {"needs_bytes": needs}
            else:
                cost = launcher.answer(recorded, "step", point, loss=loss)
            recorded["costs"].append({**_shape(point), "loss": loss, **cost})
            write(recorded, folder)
            say(f"{recorded['study']['data']} {point.name}, a step with --loss {loss}: {cost}")


def cost_of(recorded: dict[str, Any], point: Point, loss: str) -> dict[str, Any] | None:
    """What a step of the point's shape was measured to cost."""
    wanted = {**_shape(point), "loss": loss}
    return next((cost for cost in recorded["costs"] if wanted.items() <= cost.items()), None)


def _shape(point: Point) -> dict[str, int]:
    return {"n": point.n, "d": point.d, "hidden": point.hidden}


def _more_than_fused(point: Point, device: torch.device) -> float:
    """Bytes that the loss in plain PyTorch needs beyond the fused one's."""
    reference, fused = (
        plan(point.n, point.d, device=device, backend=backend).fused.peak_memory for backend in ("reference", "torch")
    )
    return reference - fused


def described(threads: int) -> dict[str, Any]:
    """The machine, for the file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {**machine.describe_machine(device), "threads": threads, "versions": machine.versions()}
