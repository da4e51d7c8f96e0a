"""The command line: ``python -m benchmarks --help``.

Exit code 0: every method that ran is right. 1: one is wrong, or failed for another reason than a lack of memory.
2: bad arguments.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import machine, report
from .accuracy import TOLERANCES
from .peers import BASELINE, LAMBD, Peer, choose_peers
from .run import Settings, ShapeResult, grid_line, run_shape

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
PEERS, GRID_PEERS = "eager,compile,lightly,fused", "eager,fused-auto"
GRID_N, GRID_D = "32,128,512,2048,4096", "128,512,2048,8192"
SECONDS, GRID_SECONDS = 60.0, 15.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Check, then time the Barlow Twins loss, forward and backward, by every method that can run here.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Methods: eager, compile, lightly, fused (every route and backend that can run here), fused-auto,\n"
        "fused-gram-torch, fused-direct-torch, ... See benchmarks/peers.py.\n"
        "Exit code: 0; 1 if a method is wrong or fails (a lack of memory is not a failure); 2 for bad arguments.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--n", type=_sizes, metavar="N,...", help="samples; several give a table each (default: 256)")
    parser.add_argument("--d", type=_sizes, metavar="D,...", help="features (default: 8192)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--peers", type=_names, metavar="NAME,...", help=f"methods (default: {PEERS})")
    parser.add_argument("--rounds", type=_positive(int), metavar="R", help="default: as many as fit into --seconds")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        metavar="S",
        help=f"timing budget a shape (default: {SECONDS:.0f}, with --grid {GRID_SECONDS:.0f}); at least 5 rounds are"
        " made unless one alone takes longer",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write everything there, after every shape")
    parser.add_argument(
        "--grid",
        action="store_true",
        help=f"one line a shape: fused against eager, without memory (default: --n {GRID_N} --d {GRID_D})",
    )
    args = parser.parse_args(argv)
    args.n = args.n or _sizes(GRID_N if args.grid else "256")
    args.d = args.d or _sizes(GRID_D if args.grid else "8192")
    args.seconds = args.seconds or (GRID_SECONDS if args.grid else SECONDS)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda was asked for, but PyTorch finds no CUDA GPU here")
    try:
        names = args.peers or _names(GRID_PEERS if args.grid else PEERS)
        args.peers = choose_peers(names, torch.device(args.device))
    except ValueError as error:
        parser.error(f"argument --peers: {error}")
    chosen = {peer.name for peer in args.peers}
    if args.grid and not {BASELINE, "fused"} <= chosen:
        parser.error("argument --peers: --grid compares eager with fused-auto; name both")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    settings = Settings(
        device=torch.device(args.device),
        dtype=DTYPES[args.dtype],
        rounds=args.rounds,
        seconds=args.seconds,
        measure_memory=not (args.no_memory or args.grid),
    )
    origin = {
        "machine": machine.describe_machine(),
        "versions": machine.versions(),
        "git": machine.git_state(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    asked = _asked(args, settings)
    console = report.make_console()
    console.print(_title(origin))
    hardware = origin["machine"]
    if hardware["load"] > hardware["cores"] / 4:
        console.print(
            f"[yellow]Other programs are running (load average {hardware['load']:.1f} on {hardware['cores']} cores):"
            " times will be wrong, ratios too.[/yellow]"
        )
    shapes: list[ShapeResult] = []
    grid: list[dict[str, Any]] | None = [] if args.grid else None
    if grid is not None:
        report.print_grid_heading(console, settings)
    for n, d in itertools.product(args.n, args.d):
        with _Progress(f"N={n} D={d}: ") as progress:
            shape = run_shape(args.peers, n, d, settings, progress)
        shapes.append(shape)
        if grid is None:
            report.print_shape(console, shape, settings)
        else:
            grid.append(grid_line(shape))
            report.print_grid_line(console, grid[-1])
        if args.json is not None:
            report.write_json(args.json, report.to_json(settings, asked, origin, shapes, grid))
    if grid is not None:
        report.print_grid(console, grid)
    return int(any(method.status in ("wrong", "failed") for shape in shapes for method in shape.methods))


def _title(origin: dict[str, Any]) -> str:
    hardware, versions = origin["machine"], origin["versions"]
    gpu = "" if hardware["gpu"] is None else f"{hardware['gpu']['name']}, "
    commit = (origin["git"]["commit"] or "unknown")[:10] + ("+" if origin["git"]["dirty"] else "")
    return (
        f"{gpu}{hardware['cpu']}, {hardware['threads']} threads. barlow_fused {versions['barlow_fused']} ({commit}), "
        f"torch {versions['torch']}."
    )


def _asked(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The settings as JSON has them."""
    loss_limit, grad_limit = TOLERANCES[settings.dtype]
    peers: list[Peer] = args.peers
    return {
        "device": args.device,
        "dtype": args.dtype,
        "n": args.n,
        "d": args.d,
        "peers": [peer.name for peer in peers],
        "rounds": args.rounds,
        "seconds": args.seconds,
        "memory": settings.measure_memory,
        "grid": args.grid,
        "lambd": LAMBD,
        "tolerances": {"loss": loss_limit, "gradient": grad_limit},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
