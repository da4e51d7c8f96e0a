"""The flags of ``barlow-fused evaluate``, which need no PyTorch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Settings(NamedTuple):
    """The official protocol's numbers."""

    epochs: int = 100
    batch_size: int = 256
    lr_classifier: float = 0.3
    weight_decay: float = 1e-6
    seed: int = 0


def parser() -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(
        prog="python -m barlow_fused evaluate",
        description="Train a linear classifier on the frozen backbone of a run (the official protocol), and test it.",
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    for name, default in Settings()._asdict().items():
        text = f"(default: {default})"
        made.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=text)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--data-dir", type=Path, help="where torchvision's data sets are (default: as in the run)")
    return made


def parse_args(argv: Sequence[str] | None = None) -> tuple[Path, dict[str, Any], Settings]:
    """The run's folder, changes to its configuration, and the settings; a bad flag ends the process with code 2."""
    flags = parser()
    arguments = vars(flags.parse_args(argv))
    run, device, data_dir = (arguments.pop(name) for name in ("run", "device", "data_dir"))
    if min(arguments["epochs"], arguments["batch_size"]) < 1:
        flags.error("--epochs and --batch-size must be at least 1")
    if not 0 < arguments["lr_classifier"] < math.inf:
        flags.error(f"--lr-classifier must be finite and more than 0; got {arguments['lr_classifier']}")
    if not 0 <= arguments["weight_decay"] < math.inf:
        flags.error(f"--weight-decay must be finite and at least 0; got {arguments['weight_decay']}")
    if not 0 <= arguments["seed"] < 2**31:
        flags.error(f"--seed must be from 0 to 2^31 - 1; got {arguments['seed']}")
    return run, {"device": device} | ({"data_dir": data_dir} if data_dir else {}), Settings(**arguments)
