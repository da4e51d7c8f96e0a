"""The process in which kernels are verified: ``python -m barlow_fused.verification.child --device cuda:0 --tell FD``.

It reads tasks from its standard input and tells what happens on the descriptor FD, a line of JSON each: standard output
is left to whatever kernels print. What it is about to do it tells before, so that a crash or a hang can be attributed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import speed
from .checks import WrongError, checks
from .record import FAILED, PASSED, UNKNOWN, Unit

Tell = Callable[..., None]


def main(argv: list[str] | None = None) -> int:
    """Work until the input ends."""
    parser = argparse.ArgumentParser("python -m barlow_fused.verification.child", description=__doc__)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--tell", type=int, required=True, metavar="FD")
    args = parser.parse_args(argv)
    with os.fdopen(args.tell, "w", buffering=1) as out:

        def tell(**message: Any) -> None:
            out.write(json.dumps(message) + "\n")

        torch.ones(1, device=args.device).item()  # a device that cannot be used says so now
        tell(ready=True)
        for line in sys.stdin:
            task = json.loads(line)
            if "unit" in task:
                if not check(Unit(*task["unit"]), args.device, tell):
                    return 0  # what is left of a device after an exception nobody knows: a new process goes on
            else:
                time([Unit(*unit) for unit in task["time"]], args.device, tell)
    return 0


def check(unit: Unit, device: torch.device, tell: Tell) -> bool:
    """All checks of one unit up to the first that fails; returns whether this process can go on."""
    for name, run in checks(unit, device):
        tell(begin=name)
        try:
            run()
        except WrongError as error:
            tell(outcome=FAILED, why=f"{name}: {error}")
            return True
        except torch.OutOfMemoryError:
            tell(outcome=UNKNOWN, why=f"{name}: there was not enough free memory on the device", last=True)
            return False
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            tell(outcome=FAILED, why=f"{name}: {type(error).__name__}: {first}", last=True)
            return False
    tell(outcome=PASSED, why="")
    return True


def time(units: list[Unit], device: torch.device, tell: Tell) -> None:
    """Times of every shape and dtype that ``units`` can run, until this process is ended."""
    for dtype, n, d, route in speed.pending(units):

        def begin(name: str, shape: tuple = (dtype, route), where: str = f"N={n} D={d}") -> None:
            tell(begin=f"{name}, timed at {where}", unit=[name, *shape, False])

        try:
            times = speed.measure(units, dtype, n, d, route, device, begin)
        except torch.OutOfMemoryError:
            continue
        if "torch" in times.seconds:
            tell(times=times._asdict())
    tell(done=True)


if __name__ == "__main__":
    sys.exit(main())
