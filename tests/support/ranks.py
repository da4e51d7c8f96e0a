"""Scripts whose checks run on every rank of several processes (tests/distributed)."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import builds
from subprocesses import environment

ENVIRONMENT = environment(OMP_NUM_THREADS="1")
RANKS = (1, 2, 3, 4)


def names_of_checks(script: Path) -> list[str]:
    """The functions that are decorated with @check; importing them would take a process group."""
    functions = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if "check" in map(ast.unparse, f.decorator_list)]


@functools.cache
def results(script: Path, backend: str, *counts: int) -> dict[int, dict[str, dict[str, str]]]:
    """What went wrong with so many ranks, {ranks: {check: {rank: traceback}}}, in one run of all checks."""
    variables = {
        "triton": lambda: {"TRITON_INTERPRET": "1"},
        "cuda": lambda: {"BARLOW_FUSED_EMULATED": str(builds.emulated())},
    }
    own = variables[backend]() if backend in variables else {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), folder, backend, *map(str, counts)]
        done = subprocess.run(command, env={**ENVIRONMENT, **own}, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-5000:]
        return {ranks: json.loads(Path(folder, f"{ranks}.json").read_text()) for ranks in counts}
