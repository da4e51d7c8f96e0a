"""The command line: ``python -m barlow_fused plan | doctor | verify | train | evaluate``.

Also installed as ``barlow-fused``. Nothing here imports PyTorch before a command needs it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .version import __version__

DTYPES = ("float32", "bfloat16", "float16", "float64")
VERIFY = (
    "Check the fused kernels on this machine's GPUs, time what is right, and record both: from the next start on, "
    "backend='auto' takes the fastest that is right. Kernels run in processes of their own, which may crash or hang."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (argparse exits by itself for ``--help`` and for wrong flags)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        _parser().print_help()
        return 0
    if argv[:1] in (["train"], ["evaluate"]):  # the trainer has its own flags, and its own --help
        return _train(argv[0], argv[1:])
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="barlow-fused",
        description="The exact Barlow Twins loss for very wide projectors.",
        epilog="barlow-fused COMMAND --help says more of a command. Errors go to stderr; exit code 2.",
    )
    parser.add_argument("--version", action="version", version=f"barlow-fused {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes this command in a shell",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    plan = commands.add_parser(
        "plan",
        help="which route and backend a shape takes, and what it costs",
        description="Which route and backend a shape takes, and what it costs beside the usual implementation.",
    )
    plan.add_argument("--n", type=int, required=True, help="samples of the global batch")
    plan.add_argument("--d", type=int, help="features")
    plan.add_argument(
        "--projector", metavar="WIDTHS", help="like 8192-8192-65536, in place of --d: a whole training step"
    )
    plan.add_argument("--features", type=int, default=2048, help="before the projector (default: 2048)")
    plan.add_argument("--optimizer", default="lars", help="of a step: lars (default), sgd or adamw")
    plan.add_argument(
        "--shard-projector", action="store_true", help="a step is always shown both ways, this one as well"
    )
    plan.add_argument("--dtype", choices=DTYPES, default="float32", help="of the inputs (default: float32)")
    plan.add_argument("--device", help="cpu, cuda, cuda:<index>, or a GPU to plan for: h200, h100, a100, b200")
    plan.add_argument("--world-size", type=int, default=1, help="ranks that share the batch (default: 1)")
    plan.add_argument("--lambd", type=float, default=0.0051, help="the loss's λ (default: 0.0051, the official one)")
    plan.add_argument(
        "--hidden", type=int, metavar="H", help="units before the last layer: the loss with that layer in it"
    )
    plan.add_argument("--route", default="auto", help="auto (default), gram or direct; with --hidden also hidden")
    plan.add_argument("--backend", default="auto", help="auto (default), torch, triton, cuda or reference")
    net = plan.add_argument_group(
        "network", "with several ranks: an alpha-beta model (barlow_fused/planning/network.py)"
    )
    net.add_argument("--latency", type=float, metavar="US", help="of a message, microseconds (default: 5)")
    net.add_argument("--intra", type=float, metavar="GB/S", help="a rank's bandwidth within its node (default: 450)")
    net.add_argument("--inter", type=float, metavar="GB/S", help="a rank's bandwidth to other nodes (default: 50)")
    net.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks that share a node (default: 8)")
    plan.add_argument("--json", action="store_true", help="print JSON; units are bytes, FLOPs and seconds")
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="what this machine can run", description="What this machine can run.")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    verify = commands.add_parser(
        "verify", help="check and time the fused kernels on this machine's GPUs, once", description=VERIFY
    )
    verify.add_argument("--device", help="like cuda:0 (default: one GPU of each model that is here)")
    verify.add_argument("--again", action="store_true", help="also where there is a record already")
    verify.add_argument("--seconds", type=_seconds, default=60.0, metavar="S", help="at most, for a GPU (default: 60)")
    verify.add_argument("--output", type=Path, metavar="FILE", help="write the record there, too")
    verify.add_argument("--json", action="store_true", help="print JSON; times are in seconds")
    verify.set_defaults(run=_verify)

    # for --help; main runs them
    commands.add_parser("train", help="pretrain on images", add_help=False)
    commands.add_parser("evaluate", help="the linear probe of a run", add_help=False)
    return parser


class _PrintCompletion(argparse.Action):
    """Prints what a shell needs to complete the command line, and ends the process."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, option_string: str | None = None) -> None:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error(f"{option_string} needs shtab: pip install 'barlow-fused[completion]'")
        print(shtab.complete(parser, shell))
        parser.exit()


def _plan(arguments: argparse.Namespace) -> int:
    import torch

    from .planning.network import Network
    from .planning.plan import plan
    from .planning.step import step_plan

    units = {"latency": 1e-6, "intra": 1e9, "inter": 1e9, "ranks_per_node": 1}
    given = {name: vars(arguments)[name] * unit for name, unit in units.items() if vars(arguments)[name] is not None}
    try:
        if (arguments.d is None) == (arguments.projector is None):
            raise ValueError("one of --d (a loss) and --projector (a training step) must be given")
        if arguments.projector is not None:
            made = step_plan(
                arguments.n,
                arguments.projector,
                dtype=getattr(torch, arguments.dtype),
                device=arguments.device,
                world_size=arguments.world_size,
                optimizer=arguments.optimizer,
                features=arguments.features,
                route=arguments.route,
                backend=arguments.backend,
                network=Network(**given),
            )
            print(json.dumps(made.to_dict(), indent=2) if arguments.json else made)
            return 0
        made = plan(
            arguments.n,
            arguments.d,
            dtype=getattr(torch, arguments.dtype),
            device=arguments.device,
            world_size=arguments.world_size,
            route=arguments.route,
            backend=arguments.backend,
            network=Network(**given),
            lambd=arguments.lambd,
            hidden=arguments.hidden,
        )
    except (ValueError, RuntimeError) as error:
        print(f"barlow-fused plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(made.to_dict(), indent=2) if arguments.json else made)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import format_report, report

    found = report()
    print(json.dumps(found, indent=2) if arguments.json else format_report(found))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from .verification.command import run

    return run(arguments)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"a number of seconds from 1 to 86400 is accepted; got {text!r}")
    return seconds


def _train(command: str, argv: list[str]) -> int:
    try:
        if command == "train":
            from .train.config import parse_args

            parse_args(argv)  # --help and wrong flags are answered before PyTorch is loaded
            from .train import main
        else:
            from .train.probe import main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "barlow_fused":
            raise
        print(
            f"barlow-fused {command} needs the module {error.name!r}, which is not installed: "
            "pip install 'barlow-fused[train]'",
            file=sys.stderr,
        )
        return 2
    return main(argv) or 0


if __name__ == "__main__":
    sys.exit(main())
