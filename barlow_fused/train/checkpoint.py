"""A run's state on disk: written whole or not at all, the last few kept, a damaged one noticed.

A checkpoint holds plain types and tensors, and is read with ``weights_only=True``: loading one runs no code.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = "checkpoints"
PARTS = ("step", "model", "optimizer", "scaler", "config")  # of a run's state


class CheckpointError(Exception):
    """A state cannot be written or read; the message says what is left."""


def save(contents: dict[str, Any], path: Path) -> None:
    """torch.save that leaves the old file or the new one, whole, whenever it is cut off.

    Raises:
        CheckpointError: the disk is full, or cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns some of the first into the second
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # gives a full disk its room back
        cause = error if isinstance(error, OSError) else error.__context__
        raise CheckpointError(f"{path} could not be written: {getattr(cause, 'strerror', error)}") from error


def load(path: Path) -> dict[str, Any]:
    """A file that ``save`` wrote.

    Raises:
        CheckpointError: it is damaged; PyTorch itself would not look at the check sums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise CheckpointError(f"{path} is damaged: the check sum of {bad} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes of the two
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; its name where it has none."""
    return str(error).partition("\n")[0] or repr(error)


def path_of(run: Path, step: int) -> Path:
    """Where the state after ``step`` steps is."""
    return run / FOLDER / f"step-{step:08}.pt"


def write(run: Path, step: int, contents: dict[str, Any], keep: int) -> Path:
    """Write the state after ``step`` steps, and remove all but the last ``keep``."""
    path = path_of(run, step)
    path.parent.mkdir(exist_ok=True)
    save({"step": step, **contents}, path)
    for old in _all(run)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def last(run: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The latest state of the run that is whole; ``say`` is told of damaged ones.

    Raises:
        CheckpointError: there is none.
    """
    paths = _all(run)
    for path in reversed(paths):
        try:
            state = load(path)
            missing = [part for part in PARTS if part not in state] if isinstance(state, dict) else PARTS
            if missing:
                raise CheckpointError(f"{path} is no state of a run: it lacks {', '.join(missing)}")
            return state
        except CheckpointError as error:
            say(f"{error}; taking the one before")
    raise CheckpointError(f"{run / FOLDER} holds no checkpoint that can be read" + (f", of {len(paths)}" * bool(paths)))


def _all(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*.pt"))
