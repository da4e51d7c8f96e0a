"""Everything that needs a GPU, in one command and within nine minutes: ``make verify-gpu``.

Builds the extension, compiles Triton's kernels (benchmarks/precompile.py), has all kernels verified (``barlow-fused
verify``), runs the tests marked gpu one by one (benchmarks/gpu_tests.py), the compute-sanitizer target and the presets
paper, wide and tall. It leaves three files to commit in benchmarks/results: <name>.json, the run that tables are made
of, <name>-record.json, which barlow_fused/verification/shipped/ takes, and <name>.log, all that was printed. A step has
what stands beside it and the time that those before it did not use; one that runs over is ended, and the others go on.
The tests and the presets know their time, less a margin, and end by themselves. Exit code 0 if all of them succeeded.

python -m benchmarks verify --name h200
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from .machine import ROOT

RESULTS = Path(__file__).resolve().parent / "results"
TOTAL_SECONDS = 540
MARGIN_SECONDS = 15  # that the benchmark's own budget ends before it would be ended
TEST_SECONDS = 60  # of one test, after which it counts as hanging; compiled before, they take a few


@dataclasses.dataclass(frozen=True)
class Step:
    """One command and the seconds that it may take; {seconds} in it are those, less the margin."""

    name: str
    command: tuple[str, ...]
    seconds: int
    margin: int = MARGIN_SECONDS


def steps(results_file: Path) -> list[Step]:
    """What is run, in this order."""
    record = results_file.with_name(f"{results_file.stem}-record.json")
    benchmark = ("-m", "benchmarks", "--device", "cuda", "--preset", "paper,wide,tall", "--seconds", "4")
    tests = ("--patience", str(TEST_SECONDS), "--", "-m", "gpu", "-k", "not makes_a_record")  # which "verify" does
    return [
        Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 90),
        Step("compile", (sys.executable, "-m", "benchmarks.precompile"), 45),
        Step("verify", (sys.executable, "-m", "barlow_fused", "verify", "--again", "--output", str(record)), 75),
        Step(
            "tests",
            (sys.executable, "-m", "benchmarks.gpu_tests", "--seconds", "{seconds}", *tests),
            195,
            TEST_SECONDS + MARGIN_SECONDS,
        ),
        Step("compute-sanitizer", ("make", "compute-sanitizer", f"RUN={sys.executable}", "EXTENSION="), 60),
        Step(
            "presets",
            (sys.executable, *benchmark, "--budget", "{seconds}", "--json", str(results_file)),
            TOTAL_SECONDS - 90 - 45 - 75 - 195 - 60,
        ),
    ]


def run_steps(todo: Sequence[Step], log: IO[str]) -> bool:
    """Runs them all; returns whether all succeeded."""
    start, allowed, ok = time.monotonic(), 0, True
    outcomes = []
    for step in todo:
        allowed += step.seconds
        begun = time.monotonic()
        left = allowed - (begun - start)
        command = [part.format(seconds=max(1, int(left) - step.margin)) for part in step.command]
        _say(log, f"\n== {step.name}: {' '.join(command)}  ({left:.0f} s)\n")
        code = _run(command, left, log)
        outcome = "ok" if code == 0 else "ran over its time" if code is None else f"failed (exit code {code})"
        outcomes.append(f"{step.name:20}{time.monotonic() - begun:6.0f} s  {outcome}")
        ok &= code == 0
    _say(log, "\n" + "\n".join([*outcomes, f"{'in all':20}{time.monotonic() - start:6.0f} s"]) + "\n")
    return ok


def _run(command: list[str], seconds: float, log: IO[str]) -> int | None:
    """A command's exit code, None if it ran over; what it prints goes to the terminal and into the log."""
    environment = {**os.environ, "BARLOW_FUSED_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it has started ends with it
        )
    except OSError as error:
        _say(log, f"{error}\n")
        return 127
    os.set_blocking(process.stdout.fileno(), False)
    stop = time.monotonic() + seconds
    with process:
        while True:
            code = process.poll()
            _say(log, (process.stdout.read() or b"").decode(errors="replace"))
            if code is not None:
                return code
            if time.monotonic() > stop:
                os.killpg(process.pid, signal.SIGKILL)
                return None
            time.sleep(0.1)


def _say(log: IO[str], text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
    log.write(text)
    log.flush()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks verify", description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="gpu", help="of the files in benchmarks/results (default: gpu)")
    args = parser.parse_args(argv)
    with (RESULTS / f"{args.name}.log").open("w") as log:
        return int(not run_steps(steps(RESULTS / f"{args.name}.json"), log))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
