"""Two runs side by side: every regression beyond the spread, by name.

python -m benchmarks compare OLD.json NEW.json
python -m benchmarks --preset small --compare OLD.json      # run now, then compare

A method has regressed at a shape where

    time     the new quartiles of a mode lie above the old ones: new q1 > old q3
    memory   it takes 5 % and 4 MB more than before (what the measurement on CPUs can resolve)
    error    its gradient's error is more than twice as large
    status   it was timed before, and is not now

Exit code 1 if there is one. Machines drift from one run to the next, so each time stands beside what the usual
implementation's time did meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from . import results
from .peers import BASELINE

MEMORY_FACTOR, MEMORY_BYTES = 1.05, 4e6
ERROR_FACTOR = 2


@dataclasses.dataclass(frozen=True)
class Regression:
    """What got worse."""

    where: str  # "N=256 D=8192 fused, launches"
    what: str


def regressions(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Regression], int]:
    """What got worse, and how many pairs of a shape and a method both runs have."""
    before, after = _methods(old), _methods(new)
    common = [key for key in before if key in after and before[key]["status"] == "timed"]
    found: list[Regression] = []
    for n, d, name in common:
        where, one, other = f"N={n} D={d} {name}", before[n, d, name], after[n, d, name]
        if other["status"] != "timed":
            found.append(Regression(where, f"was timed, is now {other['status']}: {other['message']}"))
            continue
        baseline = before.get((n, d, BASELINE)), after.get((n, d, BASELINE))
        for mode in one["times"]:
            worse = _slower(one, other, mode, baseline if name != BASELINE else (None, None))
            if worse is not None:
                found.append(Regression(f"{where}, {mode}", worse))
        memory = one["peak_extra_bytes"], other["peak_extra_bytes"]
        if None not in memory and memory[1] > max(MEMORY_FACTOR * memory[0], memory[0] + MEMORY_BYTES):
            found.append(Regression(where, f"extra memory {memory[0] / 1e6:.1f} MB -> {memory[1] / 1e6:.1f} MB"))
        errors = max(one["grad_errors"]), max(other["grad_errors"])
        if errors[1] > ERROR_FACTOR * errors[0]:
            found.append(Regression(where, f"gradient error {errors[0]:.1e} -> {errors[1]:.1e}"))
    return found, len(common)


def _slower(old: dict[str, Any], new: dict[str, Any], mode: str, baseline: tuple) -> str | None:
    one, other = _total(old, mode), _total(new, mode)
    if one is None or other is None or other["q1"] <= one["q3"]:
        return None
    text = f"{one['median'] * 1e3:.4g} ms -> {other['median'] * 1e3:.4g} ms, {other['median'] / one['median'] - 1:+.1%}"
    drift = [method and _total(method, mode) for method in baseline]
    if all(drift):
        text += f" ({BASELINE} {drift[1]['median'] / drift[0]['median'] - 1:+.1%})"
    return text


def _total(method: dict[str, Any], mode: str) -> dict[str, float] | None:
    times = method["times"].get(mode)
    return times and times["total"]


def _methods(report: dict[str, Any]) -> dict[tuple[int, int, str], dict[str, Any]]:
    return {
        (shape["n"], shape["d"], method["name"]): method for shape in report["shapes"] for method in shape["methods"]
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else differs between the runs: then their times say little."""
    pairs = {
        "device": [
            run["machine"]["gpu"]["name"] if run["machine"]["gpu"] else run["machine"]["cpu"] for run in (old, new)
        ],
        "dtype": [run["settings"]["dtype"] for run in (old, new)],
        "threads": [run["machine"]["threads"] for run in (old, new)],
        "torch": [run["versions"]["torch"] for run in (old, new)],
    }
    return [f"{name}: {one} -> {other}" for name, (one, other) in pairs.items() if one != other]


def print_comparison(console: Console, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Names the regressions; returns whether there is one."""
    found, count = regressions(old, new)
    console.print(f"\n[bold]Compared with the run of {old['started']}[/bold]: {count} methods at shapes of both")
    for difference in differences(old, new):
        console.print(Text(f"Not the same {difference}", "yellow"))
    for regression in found:
        console.print(Text(f"worse: {regression.where}: {regression.what}", "red"))
    if not found:
        console.print("Nothing regressed beyond the spread." if count else "Nothing to compare.")
    return bool(found)


def main(argv: list[str]) -> int:
    from .report import make_console

    parser = argparse.ArgumentParser("python -m benchmarks compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    return int(print_comparison(make_console(), results.load(args.old), results.load(args.new)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
