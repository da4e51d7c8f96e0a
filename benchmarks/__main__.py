"""The command line: ``python -m benchmarks --help``.

Exit code 0: every method that ran is right. 1: one is wrong, or failed for another reason than a lack of memory, or
(with --compare) something regressed. 2: bad arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from barlow_fused.backends import accelerator
from barlow_fused.choice import verify_first

from . import compare, machine, report, results
from .accuracy import TOLERANCES
from .peers import LAMBD, choose_peers
from .presets import BUDGETS_S, PRESETS, shapes_of
from .run import Settings, run_shape
from .timing import MODES

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
PEERS = "eager,compile,lightly,solo-learn,fft-relaxed,fused"
SECONDS = 5.0
COMMANDS = ("profile", "host", "contention", "compare", "readme", "verify", "width")  # they have a main() of their own


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Check, then time the Barlow Twins loss, forward and backward, by every method that can run here.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Methods: eager, compile, lightly, solo-learn, fft-relaxed (not the same loss), fused (every route and\n"
        "backend that can run here), fused-auto, fused-gram-torch, ... See benchmarks/peers.py.\n"
        "Presets: " + ", ".join(PRESETS) + ". See benchmarks/presets.py.\n"
        "Other commands: python -m benchmarks profile | host | contention | compare | readme | verify |\n"
        "width, each with --help.\n"
        "Exit code: 0; 1 if a method is wrong or fails (a lack of memory is not a failure) or something regressed;\n"
        "2 for bad arguments.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--preset", type=_names_of(PRESETS), metavar="NAME,...", help="shapes by name")
    parser.add_argument("--n", type=_sizes, metavar="N,...", help="samples; several give a table each (default: 256)")
    parser.add_argument("--d", type=_sizes, metavar="D,...", help="features (default: 8192)")
    parser.add_argument(
        "--linear", metavar="H,...", help="the last layer and the loss, with H hidden units: see --linear 1 -h"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, on GPUs bfloat16")
    parser.add_argument("--peers", type=_names, default=_names(PEERS), metavar="NAME,...", help=f"default: {PEERS}")
    parser.add_argument(
        "--modes",
        type=_names_of(MODES),
        metavar="NAME,...",
        help="launches, graph (CUDA graph replay), forward (alone); default: all that the device has",
    )
    parser.add_argument("--rounds", type=_positive(int), metavar="R", help="default: as many as fit into --seconds")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        default=SECONDS,
        metavar="S",
        help=f"for timing a shape (default: {SECONDS:.0f}); at least 5 rounds are made unless one alone takes longer",
    )
    parser.add_argument(
        "--budget",
        type=_positive(float),
        metavar="S",
        help="for the whole run: rounds are cut, compilations that would not fit are skipped",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="on a GPU whose kernels have not been verified, do not do that first"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--brief", action="store_true", help="print only one line a shape: fused against eager")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write everything there, after every shape")
    parser.add_argument("--csv", type=_file, metavar="FILE", help="one line for each shape, method and mode")
    parser.add_argument("--picture", type=_file, metavar="FILE", help="time and memory against D, roofline: PNG, SVG")
    parser.add_argument("--compare", type=_recorded, metavar="OLD.json", help="name what regressed since that run")
    args = parser.parse_args(argv)
    if args.preset and (args.n or args.d):
        parser.error("argument --preset: give either a preset, or --n and --d")
    args.shapes = shapes_of(args.preset) if args.preset else list(itertools.product(args.n or [256], args.d or [8192]))
    if args.preset and len(args.preset) == 1:
        args.budget = args.budget or BUDGETS_S.get(args.preset[0])
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda was asked for, but PyTorch finds no CUDA GPU here")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.modes = args.modes or [mode for mode in MODES if args.device == "cuda" or mode != "graph"]
    if "graph" in args.modes and args.device == "cpu":
        parser.error("argument --modes: graph needs --device cuda")
    try:
        args.peers = choose_peers(args.peers, torch.device(args.device))
    except ValueError as error:
        parser.error(f"argument --peers: {error}")
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if any(argument.partition("=")[0] == "--linear" for argument in argv):
        return importlib.import_module(".linear", __package__).main(argv)
    if argv[:1] and argv[0] in COMMANDS:
        return importlib.import_module(f".{argv[0]}", __package__).main(argv[1:])
    args = parse(argv)
    if args.device == "cuda":
        verify_first(torch.device("cuda", torch.cuda.current_device()), not args.no_verify)
    settings = Settings(
        device=torch.device(args.device),
        dtype=DTYPES[args.dtype],
        modes=tuple(args.modes),
        rounds=args.rounds,
        seconds=args.seconds,
        measure_memory=not args.no_memory,
    )
    run = {
        "machine": machine.describe_machine(settings.device),
        "versions": machine.versions(),
        "git": machine.git_state(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "settings": _asked(args),
        "shapes": [],
    }
    console = report.make_console()
    report.print_title(console, run)
    start = time.perf_counter()
    for i, (n, d) in enumerate(args.shapes):
        left = math.inf
        if args.budget is not None:
            left = (args.budget - (time.perf_counter() - start)) / (len(args.shapes) - i)
        with _Progress(f"N={n} D={d}: ") as progress:
            shape = results.plain(dataclasses.asdict(run_shape(args.peers, n, d, settings, progress, left)))
        run["shapes"].append(shape)
        run["seconds"] = time.perf_counter() - start
        if not args.brief:
            report.print_shape(console, shape, run["settings"])
        if args.json is not None:
            results.write_json(args.json, run)
    if not args.brief:
        report.print_legend(console, run)
    if args.brief or len(args.shapes) > 1:
        report.print_summary(console, run)
    console.print(f"{run['seconds']:.0f} s in all.")
    if args.csv is not None:
        results.write_csv(args.csv, run)
    if args.picture is not None:
        from .pictures import draw

        draw(run, args.picture)
    worse = args.compare is not None and compare.print_comparison(console, args.compare, run)
    broken = any(method["status"] in ("wrong", "failed") for shape in run["shapes"] for method in shape["methods"])
    return int(worse or broken)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The settings as JSON has them."""
    loss_limit, grad_limit = TOLERANCES[DTYPES[args.dtype]]
    return {
        "device": args.device,
        "dtype": args.dtype,
        "presets": args.preset,
        "shapes": args.shapes,
        "peers": [peer.name for peer in args.peers],
        "modes": args.modes,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "budget_s": args.budget,
        "memory": not args.no_memory,
        "lambd": LAMBD,
        "tolerances": {"loss": loss_limit, "gradient": grad_limit},
        "float32_matmul_precision": "high" if accelerator.tf32() else "highest",
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith("BARLOW_FUSED_")},
    }


class _Progress:
    """What happens now, on one line of a terminal that is cleared at the end; nothing elsewhere."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{self.prefix}{text} ...", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 2:
        raise argparse.ArgumentTypeError(
            f"whole numbers of at least 2, separated by commas, are accepted; got {text!r}"
        )
    return list(dict.fromkeys(sizes))


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _names_of(accepted: Any) -> Callable[[str], list[str]]:
    def convert(text: str) -> list[str]:
        names = _names(text)
        if not set(names) <= set(accepted):
            raise argparse.ArgumentTypeError(f"{', '.join(accepted)} are accepted; got {text!r}")
        return list(dict.fromkeys(names))

    return convert


def _positive(kind: type) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not (value > 0 and math.isfinite(value)):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{what} above 0 is accepted; got {text!r}")
        return value

    return convert


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"a file in an existing directory is accepted; got {text!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}")
    return path


def _recorded(text: str) -> dict[str, Any]:
    """A run that was written by --json; read before the run, which may write the same file."""
    try:
        run = results.load(Path(text))
        run["shapes"], run["settings"]["modes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"a file that --json wrote is accepted; {text!r}: {error!r}") from None
    return run


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
