"""A run's state on disk: written whole or not at all, the last few kept, a damaged one noticed.

A checkpoint holds plain types and tensors, and is read with ``weights_only=True``: loading one runs no code.

**Shards.** Of a tensor whose rows are shared over processes (shards.py) each process writes its own, into a file of
its own; only when all of these are on the disk is the checkpoint itself written, which names them. Until then the one
before is the last. Whoever reads it takes the rows that it wants (``Rows``), so the number of processes may change.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .processes import Processes

FOLDER = "checkpoints"
ALONE = Processes(0, 0, 1)
MARK = "rows in shards"  # stands in a state for a tensor whose rows are in other files
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


def write(run: Path, step: int, contents: dict[str, Any], keep: int, by: Processes = ALONE) -> Path:
    """Write the state after ``step`` steps, and remove all but the last ``keep``. Every process must call.

    Raises:
        CheckpointError: this process, or another one, cannot write.
    """
    path = path_of(run, step)
    path.parent.mkdir(exist_ok=True)
    write_state(path, {"step": step, **contents}, by)
    if by.first:
        for old in _all(run)[:-keep]:
            old.unlink(missing_ok=True)
            for part in old.parent.glob(f"{old.stem}.*.shard"):
                part.unlink(missing_ok=True)
    return path


def write_state(path: Path, contents: dict[str, Any], by: Processes = ALONE) -> None:
    """Write a state, by all processes."""
    own: dict[str, Tensor] = {}
    contents = _taken_out(contents, own, "")
    token = None
    if own:
        token = f"{by.most(secrets.randbits(60) if by.first else 0)[0]:015x}"
        contents["shards"] = {"token": token, "count": by.count}
        _together(by, lambda: save({"token": token, "rows": own}, _shard(path, token, by.rank, by.count)))
    if by.first:
        save(contents, path)
        for part in path.parent.glob(f"{path.stem}.*.shard"):  # of an earlier state after the same step
            if token is None or f".{token}." not in part.name:
                part.unlink(missing_ok=True)


def last(run: Path, say: Callable[[str], None], by: Processes = ALONE) -> dict[str, Any]:
    """The latest state of the run that is whole, the same on every process; ``say`` is told of damaged ones.

    Raises:
        CheckpointError: there is none.
    """
    paths = _all(run)
    for path in reversed(paths):
        problem, state = None, {}
        try:
            state = load(path)
            missing = [part for part in PARTS if part not in state] if isinstance(state, dict) else PARTS
            if missing:
                raise CheckpointError(f"{path} is no state of a run: it lacks {', '.join(missing)}")
            for part in _shards(path, state)[by.rank :: by.count]:  # together they look at all
                load(part)
        except CheckpointError as error:
            problem = error
        if not by.most(int(problem is not None))[0]:
            return with_rows(state, path)
        say(f"{problem or f'{path}: another process found it damaged'}; taking the one before")
    raise CheckpointError(f"{run / FOLDER} holds no checkpoint that can be read" + (f", of {len(paths)}" * bool(paths)))


class Rows:
    """A tensor whose rows are in the files of several processes."""

    def __init__(self, key: str, shape: Sequence[int], files: Sequence[Path]) -> None:
        self.key, self.shape, self.files = key, torch.Size(shape), files

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``."""
        dtype = self._of(self.files[0]).dtype
        found = torch.empty(max(0, stop - start), *self.shape[1:], dtype=dtype)
        self.read_into(found, start)
        return found

    @torch.no_grad()
    def read_into(self, target: Tensor, start: int = 0) -> None:
        """As many rows as the target has, from ``start`` on; no file is read beyond them."""
        first, step = 0, -(-self.shape[0] // len(self.files))  # as torch.chunk cuts
        for file in self.files:
            last = min(self.shape[0], first + step)
            begin, end = max(start, first), min(start + len(target), last)
            if begin < end:
                target[begin - start : end - start] = self._of(file)[begin - first : end - first]
            first = last

    def _of(self, file: Path) -> Tensor:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["rows"][self.key]


def with_rows(state: Any, path: Path) -> Any:
    """A state that was read from ``path``, with ``Rows`` where tensors are in shards."""

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            if MARK in part:
                return Rows(part[MARK], part["shape"], files)
            return {key: filled(value) for key, value in part.items()}
        return [filled(value) for value in part] if isinstance(part, list) else part

    files = _shards(path, state)
    return filled(state) if files else state


def _taken_out(part: Any, own: dict[str, Tensor], name: str) -> Any:
    """A state without its shards, which go to ``own``."""
    if isinstance(part, DTensor):
        own[name] = part.to_local()
        return {MARK: name, "shape": list(part.shape)}
    if isinstance(part, dict):
        return {key: _taken_out(value, own, f"{name}/{key}") for key, value in part.items()}
    return [_taken_out(value, own, name) for value in part] if isinstance(part, list) else part


def _shard(path: Path, token: str, rank: int, count: int) -> Path:
    return path.with_name(f"{path.stem}.{token}.{rank}-of-{count}.shard")


def _shards(path: Path, state: Any) -> list[Path]:
    """The files that a state names."""
    if not isinstance(state, dict) or "shards" not in state:
        return []
    token, count = state["shards"]["token"], state["shards"]["count"]
    return [_shard(path, token, rank, count) for rank in range(count)]


def _together(by: Processes, action: Callable[[], None]) -> None:
    """What every process does; where one cannot, all raise."""
    problem = None
    try:
        action()
    except CheckpointError as error:
        problem = error
    if by.most(int(problem is not None))[0]:
        raise problem or CheckpointError("another process could not write its shard of the state")


def _all(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*.pt"))
