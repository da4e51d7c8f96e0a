"""Every barrier, wait and fence of the CUDA kernels, left out once: which detector notices?

    python tests/support/mutations.py            writes the table, docs/races.md: about four minutes on two cores
    python tests/support/mutations.py reduce.h   prints the rows whose names contain that

Nothing is compiled again for a fault: csrc/gpu/emulation/sites.h leaves a place out.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib
import sys
from types import ModuleType
from typing import NamedTuple

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import builds  # noqa: E402
import kernel_runs  # noqa: E402
from kernel_runs import RUNS, SCHEDULES  # noqa: E402
from sites import Site, sites  # noqa: E402

TABLE = ROOT / "docs" / "races.md"
SEEDS = 2
# Nothing notices that these are missing, and why they stay.
REDUNDANT: dict[str, str] = {
    "blocks/hopper_multiply.h begin: barrier()": (
        "No kernel has clusters of one block; the products of tests/kernels/hopper_faults.cpp have, and "
        "test_planted_faults.py leaves it out there."
    ),
    "blocks/hopper_multiply.h run: warp_barrier()": (
        "It orders no memory: it keeps the producer's other lanes, which load nothing, from running ahead."
    ),
}

HEAD = """# Races: what notices a missing barrier

Each row leaves out one place of `csrc/` where threads are ordered, and each column runs the kernels in the emulation
(`csrc/gpu/emulation/README.md`) with one detector. `python tests/support/mutations.py` writes this table; a test checks
that no place is missing.

* **race**: the race detector, threads in turn. It needs no lucky order. Where it notices, the other columns have the
  three quickest runs that come there, else all.
* **in turn, late**, **reverse, early**: without it. Threads take turns from the first or from the last on, and what
  runs by itself ends as late or as early as allowed.
* **seeds**: without it, in random order; how many of the {seeds} seeds notice.

What they notice: `race`; `stops`, a launch that ends with a sentence (nobody can go on, a primitive is used wrongly);
`number`, a result that is wrong. `-` is nothing.

| left out | race | in turn, late | reverse, early | seeds |
|---|---|---|---|---|
"""
REASONS = """
What nothing notices:

| left out | why it stays |
|---|---|
"""


class Row(NamedTuple):
    race: str
    late: str
    early: str
    seeds: str

    @property
    def noticed(self) -> bool:
        return any(cell not in ("-", f"0 of {SEEDS}") for cell in self)


def kind(said: str) -> str:
    """A cell, from what a run said."""
    assert "emulation/" not in said, f"the emulation races with itself: {said}"
    if "race: " in said:
        return "race"
    if said.startswith("wrong by"):
        return "number"
    return "stops" if said else "-"


@functools.cache
def module() -> ModuleType:
    return builds.load(builds.emulated("thread"))


@functools.cache
def reached(run: str) -> frozenset[str]:
    """The places where that run orders threads; it must be right."""
    module().reached_sites()
    said = kernel_runs.outcome(module(), run, False)
    assert not said, f"{run}: {said}"
    return frozenset(module().reached_sites())


def runs_of(site: Site) -> list[str]:
    """Those that come there, quick ones first. The largest comes nowhere that the one before it does not."""
    return [run for run in list(RUNS)[:-1] if f"{site.file}:{site.line}" in reached(run)]


def first_notice(site: Site, runs: list[str], watch: bool, **variables: str) -> str:
    """What the first run says that notices anything."""
    for run in runs:
        said = kernel_runs.outcome(module(), run, watch, BARLOW_EMULATION_DROP=site.drop, **variables)
        if said:
            return said
    return ""


def mutate(site: Site) -> Row:
    """Leaves the place out, for each detector."""
    runs = runs_of(site)
    race = kind(first_notice(site, runs, True))
    if race != "-":
        runs = runs[:3]  # enough to show what the others are worth
    late, early = (kind(first_notice(site, runs, False, **variables)) for variables in SCHEDULES.values())
    seeds = sum(bool(first_notice(site, runs, False, BARLOW_EMULATION_SEED=str(seed))) for seed in range(SEEDS))
    return Row(race, late, early, f"{seeds} of {SEEDS}")


def cells(name: str, *values: str) -> str:
    return f"| `{name}` | " + " | ".join(values) + " |\n"


def main(part: str = "") -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    chosen = [site for site in sites() if part in site.name]
    for site in chosen:
        runs_of(site)  # known before there are several processes
    with concurrent.futures.ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        rows = {}
        for site, row in zip(chosen, pool.map(mutate, chosen), strict=True):
            rows[site.name] = row
            print(cells(site.name, *row), end="", flush=True)
    unnoticed = [name for name, row in rows.items() if not row.noticed]
    for name in unnoticed:
        if name not in REDUNDANT:
            print(f"nothing notices, and no reason stands in REDUNDANT: {name}")
    if part:
        return
    text = HEAD.format(seeds=SEEDS) + "".join(cells(name, *row) for name, row in rows.items())
    if unnoticed:
        text += REASONS + "".join(cells(name, REDUNDANT.get(name, "?")) for name in unnoticed)
    TABLE.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
