"""What the projector's width buys: ``python -m benchmarks width``.

It pretrains on real images, one process a run, for every point of the experiments in points.py that
``benchmarks/results/width-<data>.json`` does not have yet, and measures what a step costs. A study that was killed
goes on where it was, also in the middle of a run. Then it writes what is made of the runs: docs/width.md's tables and
pictures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from . import study
from .points import EXPERIMENTS, STUDIES, in_order


def main(argv: list[str]) -> int:
    """The command line; exit code 0, 1 if a run failed, 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks width",
        description=__doc__.partition("\n\n")[2],
        epilog="Experiments: " + "; ".join(f"{name}: {what}" for name, what in EXPERIMENTS.items()) + ".",
        allow_abbrev=False,
    )
    parser.add_argument("--data", choices=STUDIES, action="append", help="may be repeated; default: all")
    parser.add_argument("--experiment", choices=EXPERIMENTS, action="append", help="may be repeated; default: all")
    parser.add_argument("--widest", type=_whole, metavar="D", help="leave out points of larger D, which take longest")
    parser.add_argument("--part", choices=("runs", "costs"), help="only pretrain, or only measure steps; default: both")
    parser.add_argument("--seeds", type=_whole, default=3, metavar="S", help="of each point (default: 3)")
    parser.add_argument("--threads", type=_whole, default=1, metavar="T", help="of each run (default: 1)")
    parser.add_argument("--before", type=shlex.split, default=[], metavar="'CMD'", help="as in --before 'nice -n 19'")
    parser.add_argument("--out", type=Path, default=study.RESULTS, help="folder of the results")
    parser.add_argument("--runs", type=Path, default=study.RUNS, help="folder of the runs under way")
    args = parser.parse_args(argv)
    launcher = study.Launcher(tuple(args.before), args.threads, args.runs)
    try:
        for data in args.data or STUDIES:
            recorded = study.read(data, args.out)
            wanted = in_order(args.experiment or list(EXPERIMENTS), STUDIES[data], args.seeds)
            wanted = [point for point in wanted if args.widest is None or point.d <= args.widest]
            for part, add in (("runs", study.add_runs), ("costs", study.add_costs)):
                if args.part in (None, part):
                    add(recorded, wanted, launcher, args.out, lambda text: print(text, flush=True))
    except study.StudyError as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 1
    if args.out == study.RESULTS:
        from .. import readme  # which imports the tables and pictures of this package

        readme.main([])
    return 0


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is accepted; got {text!r}")
    return int(text)
