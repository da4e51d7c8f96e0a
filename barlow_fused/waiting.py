"""How OpenMP's threads wait for one another in our commands: briefly, then asleep.

By default they spin for milliseconds at the end of every operator. Beside another busy program a thread may wait in
this way for one that does not run, and one of many short operators takes several times as long (benchmarks/NOTES.md).
OpenMP reads its settings when PyTorch is loaded, so this comes before that, and only where a command of this package
runs: a library leaves its user's threads alone. Both variables can be set for scripts, too.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # any OpenMP
    "GOMP_SPINCOUNT": "1000",  # GNU's, of PyTorch's wheels for Linux: some 10 us, which cost less than to sleep
}


def is_command() -> bool:
    """Whether this process is ``python -m barlow_fused ...`` or ``barlow-fused ...``."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # while Python looks for the module
        pairs = itertools.pairwise(sys.orig_argv)
        return any(flag == "-m" and name.partition(".")[0] == __package__ for flag, name in pairs)
    return Path(program).stem == "barlow-fused"


def set_policy() -> None:
    """Set what the user has not set, if it is not too late."""
    if is_command() and "torch" not in sys.modules and not SETTINGS.keys() & os.environ.keys():
        os.environ.update(SETTINGS)
