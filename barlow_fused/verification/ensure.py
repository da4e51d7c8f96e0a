"""A record before work begins: ``barlow-fused verify`` in a process of its own, waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

COMMAND = (sys.executable, "-m", "barlow_fused", "verify")
SECONDS = 60  # that one GPU's verification may take
START = 30  # that processes may take to start, on a slow file system


def ensure(device: torch.device) -> str | None:
    """Has ``device`` verified unless it is already; returns why that did not come about, None where it did.

    Its progress goes to stderr. Processes that ask for the same GPU model at once wait for the first of them.
    """
    index = f":{device.index}" if device.index is not None else ""
    command = [*COMMAND, "--device", f"{device.type}{index}", "--seconds", str(SECONDS)]
    environment = {**os.environ, "BARLOW_FUSED_VERIFY": "never", "PYTHONPATH": python_path()}
    limit = 2 * (SECONDS + START)  # the wait for another process, then its own work
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=limit)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"barlow-fused verify did not end: {error}"
    return None if done.returncode == 0 else f"barlow-fused verify failed with exit code {done.returncode}"


def python_path() -> str:
    """PYTHONPATH for a process that must find this package, wherever it was imported from."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
